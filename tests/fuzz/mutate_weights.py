"""Weight files and indexes that lie: honest ones with a few edits that know their structure."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from tests.checkpoint.craft import INDEX, SINGLE
from tests.fuzz.cases import CONFIG, Case, Content, Seed, WeightFile, data_bytes_of, header_of, sharded
from tests.fuzz.edits import Twin, edit_anything, edit_bytes, hostile, hostile_text, to_text

_DTYPES: Final = (
    "F32 F16 BF16 F64 I8 U8 BOOL I16 U16 I32 U32 I64 U64 F8_E4M3 F8_E5M2 C64 F4 F6_E2M3 F8_E8M0 f32 BF16\0".split(" ")
)
_HEADER_WORDS: Final = ("dtype", "shape", "data_offsets", "__metadata__", "format", "stride", "a", "weight")
_INDEX_WORDS: Final = ("weight_map", "metadata", "total_size", "total_parameters", "lm_head.weight", "x")
_MANIFEST: Final = "pyruntime_manifest.json"
_MANIFEST_WORDS: Final = (
    "format",
    "version",
    "files",
    "made",
    "bytes",
    "sha256",
    "header_sha256",
    "../x",
    CONFIG,
    SINGLE,
)
_SHARDS: Final = (
    "../model.safetensors", "/model.safetensors", "/dev/zero", "/dev/zero.safetensors", "sub/model.safetensors",
    "./x.safetensors", "http://host/model.safetensors", "file:model.safetensors", "..\\model.safetensors",
    "x\0.safetensors", "x\n.safetensors", ".safetensors", ".hidden.safetensors", "..", ".", "", "model.bin",
    "model.SAFETENSORS", "x" * 243 + ".safetensors", "x" * 244 + ".safetensors", "x" * 5000 + ".safetensors",
    "é" * 130 + ".safetensors", "other.safetensors", SINGLE, INDEX, CONFIG, "model.safetensors ", "~.safetensors",
    "$HOME.safetensors", "CON.safetensors", "\udcff.safetensors", "a\u202eb.safetensors",
)  # fmt: skip
_STRAYS: Final = (
    "pytorch_model.bin", "model.gguf", "a\x1b[2J.bin", "a\nb.pt", os.fsdecode(b"\xff.bin"), "extra.safetensors",
    SINGLE, INDEX, "modeling_x.py", ".bin",
)  # fmt: skip


@dataclass(slots=True)
class _Draft:
    """A weight file while it is edited."""

    tree: dict[str, Any]
    data_bytes: int
    claimed: int | None = None
    cut: int | None = None

    def finish(self, rng: Random) -> WeightFile:
        text = to_text(self.tree, rng.random() < 0.8)
        if rng.random() < 0.08:
            text = edit_bytes(rng, text)
        if self.claimed is not None:
            self.claimed = max(0, (self.claimed + len(text)) % (1 << 64))
        return WeightFile(text, self.data_bytes, self.claimed, self.cut)


@dataclass(slots=True)
class _Folder:
    """An indexed checkpoint while it is edited."""

    index: dict[str, Any]
    shards: dict[str, _Draft | WeightFile]
    more: dict[str, Content] = field(default_factory=dict)


def num_edits(rng: Random) -> int:
    """How many edits a case gets: mostly one, so that most errors are reached alone."""
    return rng.choice((1, 1, 1, 2, 2, 3, 4))


def make_header(rng: Random, seed: Seed) -> Case:
    """A weight file whose header lies."""
    header = header_of(seed.tensors if rng.random() < 0.2 else {"a": (2, 2), "b.weight": (3,), "c": ()})
    return Case("header", {SINGLE: _edited_weights(rng, header)}, "header")


def _edited_weights(rng: Random, header: dict[str, Any]) -> WeightFile:
    draft = _Draft(header, data_bytes_of(header))
    for _ in range(num_edits(rng)):
        if rng.random() < 0.4:
            edit_anything(rng, draft.tree, _HEADER_WORDS)
        else:
            rng.choice(_HEADER_EDITS)(rng, draft)
    return draft.finish(rng)


def _entry(rng: Random, draft: _Draft) -> tuple[str, dict[str, Any]] | None:
    """A tensor whose entry is still whole."""
    whole = [
        (name, entry)
        for name, entry in draft.tree.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("shape"), list)
        and isinstance(entry.get("data_offsets"), list)
        and len(entry["data_offsets"]) == 2
        and all(type(each) is int for each in (*entry["shape"], *entry["data_offsets"]))
    ]
    return rng.choice(whole) if whole else None


def _shift_offset(rng: Random, draft: _Draft) -> None:
    if (found := _entry(rng, draft)) is not None:
        by = rng.choice((-2, -1, 1, 2, 8, 1 << 32, 1 << 63))
        offsets, which = found[1]["data_offsets"], rng.randrange(3)
        found[1]["data_offsets"] = [offsets[0] + by * (which != 1), offsets[1] + by * (which != 0)]


def _share_offsets(rng: Random, draft: _Draft) -> None:
    first, second = _entry(rng, draft), _entry(rng, draft)
    if first is not None and second is not None:
        first[1]["data_offsets"] = list(second[1]["data_offsets"])


def _reshape(rng: Random, draft: _Draft) -> None:
    if (found := _entry(rng, draft)) is not None:
        shape = found[1]["shape"]
        longer = ([*shape, 1], [1] * 9, [*shape, 0], [0, *shape], shape * 3)
        other = (
            shape[::-1],
            [1 << 32, 1 << 32],
            [1 << 62, 8],
            [(1 << 63) - 1],
            [0, 1 << 63],
            shape[:-1],
            [-each for each in shape],
        )
        found[1]["shape"] = rng.choice((*longer, *other))


def _retype(rng: Random, draft: _Draft) -> None:
    if (found := _entry(rng, draft)) is not None:
        found[1]["dtype"] = rng.choice(_DTYPES)


def _rename_tensor(rng: Random, draft: _Draft) -> None:
    if draft.tree:
        name = rng.choice(list(draft.tree))
        names = (
            *draft.tree,
            hostile_text(rng),
            "n" * 512,
            "n" * 513,
            "é" * 256,
            name + "..",
            "/" + name,
            "__metadata__",
            name.upper(),
        )
        new = rng.choice(names)
        draft.tree[Twin(new) if rng.random() < 0.3 else new] = draft.tree.pop(name)


def _set_metadata(rng: Random, draft: _Draft) -> None:
    draft.tree["__metadata__"] = rng.choice(
        (hostile(rng), {hostile_text(rng): hostile_text(rng)}, {"format": hostile(rng)})
    )


def _shuffle(rng: Random, draft: _Draft) -> None:
    items = list(draft.tree.items())
    rng.shuffle(items)
    draft.tree = dict(items)


def _add_empty(rng: Random, draft: _Draft) -> None:
    at = rng.choice((0, draft.data_bytes, 8, 4, 1))
    shape = rng.choice(([0], [0, 1 << 62], [3, 0], [0] * 8))
    draft.tree[rng.choice(("empty", "z", "a.0"))] = {
        "dtype": rng.choice(_DTYPES),
        "shape": shape,
        "data_offsets": [at, at],
    }


def _resize_data(rng: Random, draft: _Draft) -> None:
    draft.data_bytes = rng.choice(
        (0, 1, draft.data_bytes + 1, max(0, draft.data_bytes - 1), draft.data_bytes + 4096, 1 << 40)
    )


def _claim(rng: Random, draft: _Draft) -> None:
    # relative to the true length, which is known at the end
    draft.claimed = rng.choice((-1, 1, 2, -2, 8, 1 << 24, 1 << 32, 1 << 62, (1 << 63) - 64, 1 << 63, -64))


def _cut(rng: Random, draft: _Draft) -> None:
    draft.cut = rng.choice((0, 1, 7, 8, 9, 10, 40, 100))


_HEADER_EDITS: Final[tuple[Callable[[Random, _Draft], None], ...]] = (
    _shift_offset, _shift_offset, _share_offsets, _reshape, _reshape, _retype, _retype, _rename_tensor, _rename_tensor,
    _set_metadata, _shuffle, _add_empty, _resize_data, _claim, _cut,
)  # fmt: skip


def make_index(rng: Random, seed: Seed) -> Case:
    """An indexed checkpoint whose index, shards or names of files lie."""
    headers = sharded(seed)
    weight_map = {name: file for file, header in headers.items() for name in header if name != "__metadata__"}
    total = sum(map(data_bytes_of, headers.values()))
    drafts: dict[str, _Draft | WeightFile] = {
        file: _Draft(header, data_bytes_of(header)) for file, header in headers.items()
    }
    folder = _Folder({"metadata": {"total_size": total}, "weight_map": weight_map}, drafts)
    for _ in range(num_edits(rng)):
        if rng.random() < 0.3:
            edit_anything(rng, folder.index, _INDEX_WORDS)
        else:
            rng.choice(_INDEX_EDITS)(rng, folder)
    text = to_text(folder.index, rng.random() < 0.8)
    files: dict[str, Content] = {
        CONFIG: seed.config.encode(),
        INDEX: edit_bytes(rng, text) if rng.random() < 0.08 else text,
    }
    for file, draft in folder.shards.items():
        files[file] = WeightFile(to_text(draft.tree), draft.data_bytes) if isinstance(draft, _Draft) else draft
    files |= folder.more
    if rng.random() < 0.15:
        files[_MANIFEST] = _manifest(rng, files)
    return Case("index", files, f"{seed.name}-shards")


def _manifest(rng: Random, files: dict[str, Content]) -> bytes:
    """What vouches for `files`, true or edited."""
    listed: dict[str, Any] = {}
    for name, content in files.items():
        if isinstance(content, WeightFile) and content.num_bytes < 1 << 20:
            whole = content.start().ljust(content.num_bytes, b"\0")
            header = hashlib.sha256(content.start()[: 8 + len(content.header)]).hexdigest()
            listed[name] = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "header_sha256": header}
        elif isinstance(content, bytes) and name in (CONFIG, INDEX):
            listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": "pyruntime-manifest", "version": 1, "files": listed, "made": {}}
    for _ in range(rng.randrange(3)):
        edit_anything(rng, manifest, _MANIFEST_WORDS)
    return to_text(manifest)


def _map_of(folder: _Folder) -> dict[str, Any]:
    """The map of the index, or one that nobody sees where an edit took it away."""
    found = folder.index.get("weight_map")
    return found if isinstance(found, dict) and found else {"x": "x"}


def _move_tensor(rng: Random, folder: _Folder) -> None:
    table = _map_of(folder)
    table[rng.choice(list(table))] = rng.choice((*folder.shards, rng.choice((rng.choice(_SHARDS), hostile(rng)))))


def _list_tensor(rng: Random, folder: _Folder) -> None:
    table = _map_of(folder)
    name = rng.choice((*table, hostile_text(rng), "model.layers.9.extra.weight"))
    table[Twin(name) if rng.random() < 0.5 else name] = rng.choice((*folder.shards, rng.choice(_SHARDS)))


def _rename_shard(rng: Random, folder: _Folder) -> None:
    if folder.shards:
        old, new = rng.choice(list(folder.shards)), rng.choice(_SHARDS)
        # the file goes along only where that is a name a file of this folder can have
        if (
            os.path.basename(new) == new
            and "\0" not in new
            and len(os.fsencode(new)) < 256
            and new not in ("", ".", "..", CONFIG, INDEX)
        ):
            folder.shards[new] = folder.shards.pop(old)
        table = _map_of(folder)
        for name in table:
            if table[name] == old:
                table[name] = new


def _lose_shard(rng: Random, folder: _Folder) -> None:
    if folder.shards:
        del folder.shards[rng.choice(list(folder.shards))]


def _swap_shards(_rng: Random, folder: _Folder) -> None:
    folder.shards = dict(zip(folder.shards, reversed(list(folder.shards.values())), strict=True))


def _copy_shard(rng: Random, folder: _Folder) -> None:
    if folder.shards:
        copied = copy.deepcopy(rng.choice(list(folder.shards.values())))
        folder.shards[rng.choice(("extra.safetensors", SINGLE, *folder.shards))] = copied


def _move_stored(rng: Random, folder: _Folder) -> None:
    """A tensor goes to another file; both headers are honest, and the index may know."""
    drafts = {file: each for file, each in folder.shards.items() if isinstance(each, _Draft)}
    if not drafts:
        return
    source, target = rng.choice(list(drafts)), rng.choice(list(drafts))
    shapes = {file: _shapes_of(drafts[file]) for file in (source, target)}
    if shapes[source]:
        name = rng.choice(list(shapes[source]))
        shapes[target][name] = shapes[source].pop(name) if rng.random() < 0.8 else shapes[source][name]
        for file in (source, target):
            header = header_of(shapes[file])
            folder.shards[file] = _Draft(header, data_bytes_of(header))
        if rng.random() < 0.5:
            _map_of(folder)[name] = target


def _shapes_of(draft: _Draft) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry["shape"]) for name, entry in draft.tree.items() if name != "__metadata__"}


def _edit_shard(rng: Random, folder: _Folder) -> None:
    if folder.shards:
        file = rng.choice(list(folder.shards))
        draft = folder.shards[file]
        if isinstance(draft, _Draft):
            folder.shards[file] = _edited_weights(rng, draft.tree)


def _add_stray(rng: Random, folder: _Folder) -> None:
    folder.more[rng.choice(_STRAYS)] = rng.choice((b"", b"\x80\x04.", b"{}"))


_INDEX_EDITS: Final[tuple[Callable[[Random, _Folder], None], ...]] = (
    _move_tensor, _list_tensor, _rename_shard, _lose_shard, _swap_shards, _copy_shard, _move_stored, _edit_shard,
    _edit_shard, _edit_shard, _add_stray,
)  # fmt: skip
