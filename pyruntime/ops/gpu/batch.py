"""A step's rows in static device memory: filled on the host, sent in one transfer, only where something changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

from pyruntime.ops.gpu.frame import GpuView
from pyruntime.ops.sample import SampleConfig
from pyruntime.ops.step import Rows, SequenceSlice

# every field starts where 16 bytes can be read at once
_ALIGNMENT: Final = 4
_SAMPLING: Final = {
    # as wide as the reference has them: a border of top-p must not move
    "temperature": torch.float64,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seed": torch.int64,
    "top_k": torch.int32,
    "step": torch.int32,
}


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The largest step: rows, rows with logits, sequences, and pages of one sequence."""

    max_rows: int
    max_wanted: int
    max_sequences: int
    max_pages: int

    def holds(self, other: BatchSizes) -> bool:
        """Whether a step of the `other` sizes fits."""
        mine = (self.max_rows, self.max_wanted, self.max_sequences, self.max_pages)
        theirs = (other.max_rows, other.max_wanted, other.max_sequences, other.max_pages)
        return all(a >= b for a, b in zip(mine, theirs, strict=True))

    def union(self, other: BatchSizes) -> BatchSizes:
        """The least that holds both."""
        return BatchSizes(
            max(self.max_rows, other.max_rows),
            max(self.max_wanted, other.max_wanted),
            max(self.max_sequences, other.max_sequences),
            max(self.max_pages, other.max_pages),
        )


def sizes_of(slices: Sequence[SequenceSlice]) -> BatchSizes:
    """What a step of `slices` needs."""
    return BatchSizes(
        max_rows=sum(len(each.token_ids) for each in slices),
        max_wanted=sum(len(each.wanted) for each in slices),
        max_sequences=len(slices),
        max_pages=max((len(each.pages) for each in slices), default=0),
    )


class RowSampling(NamedTuple):
    """How a row samples, as in SampleConfig; `step` is the output position that its random number belongs to."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    step: int

    @staticmethod
    def of(config: SampleConfig, step: int) -> RowSampling:
        """The part of `config` that the device needs; the seed's 64 bits as a signed number."""
        bits = config.seed & (2**64 - 1)
        seed = bits - 2**64 if bits >= 2**63 else bits
        return RowSampling(config.temperature, config.top_k, config.top_p, config.min_p, seed, step)

    def next(self) -> RowSampling:
        """The same for the output position behind it."""
        return RowSampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.step + 1)


GREEDY: Final = RowSampling(0.0, 0, 1.0, 0.0, 0, 0)


class DecodeRow(NamedTuple):
    """One sequence of a decode step."""

    token_id: int
    position: int
    pages: tuple[int, ...]
    sampling: RowSampling

    def next(self, token_id: int) -> DecodeRow:
        """The row behind it."""
        return DecodeRow(token_id, self.position + 1, self.pages, self.sampling.next())


class StaticBatch:
    """The arrays of `GpuView`, for all rows and for the wanted ones, and how rows sample, as parts of one tensor.

    `spare_page` is the page that padding rows write to.
    """

    def __init__(self, device: torch.device, sizes: BatchSizes, spare_page: int) -> None:
        self.sizes = sizes
        self._spare_page = spare_page
        fields = _fields(sizes)
        ends = list(itertools.accumulate(_padded(math.prod(shape), dtype) for shape, dtype in fields.values()))
        begins = dict(zip(fields, [0, *ends], strict=False))

        def parts(whole: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: whole[begins[name] : begins[name] + _words(math.prod(shape), dtype)].view(dtype).view(shape)
                for name, (shape, dtype) in fields.items()
            }

        host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host, self._device = host, torch.zeros(ends[-1], dtype=torch.int32, device=device)
        # what the device holds, as far as the host knows
        self._rows: tuple[DecodeRow, ...] | None = None
        self._moving: tuple[DecodeRow, ...] = ()
        self._tensors = parts(self._device)
        self._arrays = {name: part.numpy() for name, part in parts(host).items()}
        # pages of each sequence as they stand in the table
        self._pages: list[tuple[int, ...]] = [()] * sizes.max_sequences
        self._padded = 0
        self._counting = np.arange(sizes.max_sequences + 1, dtype=np.int32)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def tensor(self, name: str, rows: Rows = Rows.ALL) -> torch.Tensor:
        """The device memory of a field, of the view of `rows` where each view has its own."""
        return self._tensors[name if name in self._tensors else f"{rows}.{name}"]

    def load(self, slices: Sequence[SequenceSlice]) -> None:
        """Start the transfer of a step's rows."""
        self._rows = None
        self._wait()
        self._fill_rows(slices)
        self._fill_pages([tuple(each.pages) for each in slices])
        self._arrays["contexts"][: len(slices)] = [each.start + len(each.token_ids) for each in slices]
        self._send()

    def load_decode(self, slices: Sequence[SequenceSlice], padded: int, sampling: Sequence[RowSampling]) -> None:
        """Put one row of each sequence on the device, then padding up to `padded` rows; no transfer if all is there."""
        rows = tuple(
            DecodeRow(each.token_ids[0], each.start, tuple(each.pages), how)
            for each, how in zip(slices, sampling, strict=True)
        )
        known, self._rows, self._moving = self._rows, None, rows
        # what was left of a longer step is no padding
        if rows == known and padded == self._padded:
            return
        self._wait()
        spare = padded - len(rows)
        columns = {
            f"{Rows.ALL}.token_ids": [row.token_id for row in rows],
            f"{Rows.ALL}.positions": [row.position for row in rows],
            # a greedy row is the cheapest
            **{name: [getattr(row.sampling, name) for row in rows] for name in _SAMPLING},
        }
        for name, values in columns.items():
            self._arrays[name][:padded] = [*values, *[0] * spare]
        self._arrays["contexts"][:padded] = self._arrays[f"{Rows.ALL}.positions"][:padded] + 1
        for name in ("sequences", "index"):
            self._arrays[f"{Rows.ALL}.{name}"][:padded] = self._counting[:padded]
        self._arrays[f"{Rows.ALL}.starts"][: padded + 1] = self._counting[: padded + 1]
        # a padding row moves on with the others until the next transfer
        self._fill_pages([*(row.pages for row in rows), *[(self._spare_page,) * self.sizes.max_pages] * spare])
        self._send()
        self._padded = padded

    def advanced(self, token_ids: Sequence[int]) -> None:
        """Say that the device has fed `token_ids` back to the rows last loaded and moved each on by one position.

        Without this, the next load sends everything.
        """
        self._rows = tuple(row.next(token_id) for row, token_id in zip(self._moving, token_ids, strict=True))

    def forget(self) -> None:
        """Say that what the device holds is not known: the next load sends everything."""
        self._rows = None

    def _wait(self) -> None:
        """The host's arrays may still be on their way."""
        if self._copied is not None:
            self._copied.synchronize()

    def _send(self) -> None:
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _fill_pages(self, pages: Sequence[tuple[int, ...]]) -> None:
        """The table, where it differs from what it held."""
        table = self._arrays["page_table"]
        for i, own in enumerate(pages):
            known = self._pages[i]
            if own != known:
                # a sequence that got a page keeps the others
                begin = len(known) if own[: len(known)] == known else 0
                table[i, begin : len(own)] = own[begin:]
                self._pages[i] = own

    def _fill_rows(self, slices: Sequence[SequenceSlice]) -> None:
        lengths = [len(each.token_ids) for each in slices]
        token_ids = np.fromiter(itertools.chain(*(each.token_ids for each in slices)), np.int32)
        positions = np.concatenate([np.arange(each.start, each.start + len(each.token_ids)) for each in slices])
        sequences = np.repeat(np.arange(len(slices)), lengths)
        first = itertools.accumulate(lengths, initial=0)
        wanted = [np.asarray(each.wanted, dtype=np.int64) + begin for each, begin in zip(slices, first, strict=False)]
        everything = np.arange(len(token_ids))
        counts = [len(each.wanted) for each in slices]
        for rows, index, per_sequence in (
            (Rows.ALL, everything, lengths),
            (Rows.WANTED, np.concatenate(wanted), counts),
        ):
            values = {"token_ids": token_ids, "positions": positions, "sequences": sequences, "index": everything}
            for name, array in values.items():
                self._arrays[f"{rows}.{name}"][: len(index)] = array[index]
            self._arrays[f"{rows}.starts"][: len(slices) + 1] = list(itertools.accumulate(per_sequence, initial=0))

    def view(self, rows: Rows, num_rows: int, num_sequences: int, longest: int, *, decode: bool) -> GpuView:
        """The view of the first rows of `rows`."""
        names = ("token_ids", "positions", "sequences", "starts", "contexts", "page_table", "index")
        return GpuView(
            num_rows=num_rows,
            num_sequences=num_sequences,
            longest=longest,
            decode=decode,
            **{name: self.tensor(name, rows) for name in names},
        )


def _fields(sizes: BatchSizes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every field."""
    count = sizes.max_sequences
    shapes: dict[str, tuple[int, ...]] = {"page_table": (count, max(sizes.max_pages, 1)), "contexts": (count,)}
    for rows, most in ((Rows.ALL, sizes.max_rows), (Rows.WANTED, sizes.max_wanted)):
        shapes |= {f"{rows}.{name}": (most,) for name in ("token_ids", "positions", "sequences", "index")}
        shapes[f"{rows}.starts"] = (count + 1,)
    fields = {name: (shape, torch.int32) for name, shape in shapes.items()}
    return fields | {name: ((count,), dtype) for name, dtype in _SAMPLING.items()}


def _words(count: int, dtype: torch.dtype) -> int:
    return count * dtype.itemsize // 4


def _padded(count: int, dtype: torch.dtype) -> int:
    return -(-_words(count, dtype) // _ALIGNMENT) * _ALIGNMENT
