"""Changes of the stream's basis, x* = x T + c: what becomes of the maps that write it and of those that read it.

All in float64 and row-vector notation (y = x W, matrices [inputs, outputs]); the formulas are in docs/merging.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pyruntime.checkpoint import Weight
from pyruntime.passes.merge.algebra import Factored


class Change(Protocol):
    """One change of basis, computed."""

    def write(self, matrix: torch.Tensor) -> torch.Tensor:
        """W T of a map that writes the stream; rows, such as a bias or those of a table, likewise."""
        ...

    def read(self, matrix: torch.Tensor) -> torch.Tensor:
        """T^-1 R of a map that reads the stream."""
        ...

    @property
    def offset(self) -> torch.Tensor | None:
        """c, which one of the writers adds."""
        ...

    @property
    def origin(self) -> torch.Tensor | None:
        """-c T^-1: x = x* T^-1 + origin, so that a reader's bias grows by origin R."""
        ...

    @property
    def cond(self) -> float | None:
        """Condition number of T, None where nothing is inverted."""
        ...


@dataclass(frozen=True, slots=True)
class Into:
    """The stream becomes what a map gives: T = X, c its bias."""

    matrix: torch.Tensor
    factored: Factored
    offset: torch.Tensor | None

    def write(self, matrix: torch.Tensor) -> torch.Tensor:
        """W X."""
        return matrix @ self.matrix

    def read(self, matrix: torch.Tensor) -> torch.Tensor:
        """X^-1 R."""
        return self.factored.solve(matrix)

    @property
    def origin(self) -> torch.Tensor | None:
        """-c X^-1."""
        return None if self.offset is None else -self.factored.solve_right(self.offset[None])[0]

    @property
    def cond(self) -> float:
        """Of X."""
        return self.factored.condition()


@dataclass(frozen=True, slots=True)
class OutOf:
    """The stream becomes what a map is given: T = P^-1, and `origin` is the map's bias.

    Where that map alone writes the stream, nothing is inverted and P need not even be square.
    """

    matrix: torch.Tensor
    factored: Factored | None
    origin: torch.Tensor | None
    offset: None = None

    def write(self, matrix: torch.Tensor) -> torch.Tensor:
        """W P^-1."""
        assert self.factored is not None
        return self.factored.solve_right(matrix)

    def read(self, matrix: torch.Tensor) -> torch.Tensor:
        """P R."""
        return self.matrix @ matrix

    @property
    def cond(self) -> float | None:
        """Of P, where others write the stream too."""
        return None if self.factored is None else self.factored.condition()


@dataclass(frozen=True, slots=True)
class Rotated:
    """The stream is rotated by `u` [d, d], which commutes with RMSNorm, after its mean was taken out if `centred`."""

    u: torch.Tensor
    centred: bool
    offset: None = None
    origin: None = None
    cond: None = None

    def write(self, matrix: torch.Tensor) -> torch.Tensor:
        """W U, W minus the mean over its outputs first if centred."""
        return (matrix - matrix.mean(-1, keepdim=True) if self.centred else matrix) @ self.u

    def read(self, matrix: torch.Tensor) -> torch.Tensor:
        """U^T R."""
        return self.u.T @ matrix


@dataclass(slots=True)
class Memo:
    """The `size` changes that were asked for last, latest first.

    Writers and readers of one boundary are asked for one after the other, but those of parallel layers by turns with
    those of the next boundary: there two are needed.
    """

    size: int
    recent: list[tuple[Basis, Change]] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """A change of basis, computed when it is needed from maps that lie side by side: X = [A|B|..], c likewise.

    `leaves`: the stream becomes what the maps are given, not what they give.
    """

    maps: tuple[tuple[Weight, Weight | None], ...]
    make: Callable[[torch.Tensor, torch.Tensor | None], Change]
    memo: Memo
    leaves: bool = False

    @property
    def biased(self) -> bool:
        """Whether the maps have an offset."""
        return any(bias is not None for _, bias in self.maps)

    @property
    def offsets(self) -> bool:
        """Whether a writer adds an offset: where the stream becomes what biased maps give."""
        return self.biased and not self.leaves

    @property
    def sources(self) -> tuple[Weight, ...]:
        """Matrices, then the biases there are."""
        return (*(weight for weight, _ in self.maps), *(bias for _, bias in self.maps if bias is not None))

    def matrix(self, *sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """X [in, out] and c [out] from what `sources` hold."""
        matrices, biases = sources[: len(self.maps)], list(sources[len(self.maps) :])
        x = torch.cat([each.T for each in matrices], dim=1)
        if not self.biased:
            return x, None
        parts = [
            torch.zeros(len(each), dtype=x.dtype) if bias is None else biases.pop(0)
            for each, (_, bias) in zip(matrices, self.maps, strict=True)
        ]
        return x, torch.cat(parts)

    def change(self, *sources: torch.Tensor) -> Change:
        """The change, given what `sources` hold."""
        recent = self.memo.recent
        place = next((i for i, (basis, _) in enumerate(recent) if basis is self), None)
        if place is None:
            # an old one goes before the new one takes its memory
            del recent[self.memo.size - 1 :]
            recent.insert(0, (self, self.make(*self.matrix(*sources))))
        else:
            recent.insert(0, recent.pop(place))
        return recent[0][1]
