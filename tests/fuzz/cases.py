"""What a fuzz case is: the files of one hostile input, small enough to be kept as readable JSON."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.checkpoint.craft import SINGLE

TARGETS: Final = ("header", "index", "config", "drop-plan")
CONFIG: Final = "config.json"
PLAN: Final = "plan.json"
MAPPING: Final = "layer_mapping.json"
SEEDS: Final = Path(__file__).parent / "seeds"
CORPUS: Final = Path(__file__).parent / "corpus"
_ITEM_BYTES: Final = 2
_SHORT_LIST: Final = re.compile(r"\[\n[-\w.,\s]{1,60}\n\s*\]")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file whose data is zeros: `claimed` is the header length it states, `cut` where it ends early."""

    header: bytes
    data_bytes: int = 0
    claimed: int | None = None
    cut: int | None = None

    def start(self) -> bytes:
        """Everything before the data."""
        length = len(self.header) if self.claimed is None else self.claimed
        return (length.to_bytes(8, "little") + self.header)[: self.cut]

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        whole = 8 + len(self.header) + self.data_bytes
        return whole if self.cut is None else min(whole, self.cut)


Content = bytes | WeightFile


@dataclass(frozen=True, slots=True)
class Case:
    """The files of one input to `target` by name; `place` says which folder may be reused to write them."""

    target: str
    files: Mapping[str, Content]
    place: str = "corpus"


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed case and the pattern of the code that a rule asks for.

    "ok" is for what must be accepted, "[A-Z]*" for a refusal whose code the rule leaves open, "*" where only the
    property must hold. Rules are L01 to L18 for weight files and C01 to C13 for config.json and drop plans.
    """

    case: Case
    rule: str
    expect: str
    why: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid checkpoint as transformers writes it: its config.json, the shapes of its tensors, and their file."""

    name: str
    config: str
    tensors: Mapping[str, tuple[int, ...]]
    file: WeightFile


def header_of(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """An honest header of bfloat16 tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    return header


def data_bytes_of(header: Mapping[str, Any]) -> int:
    """Bytes of data that an honest header describes."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def whole(seed: Seed) -> Case:
    """`seed` as a folder with one weight file."""
    return Case("config", {CONFIG: seed.config.encode(), SINGLE: seed.file}, seed.name)


def sharded(seed: Seed) -> dict[str, dict[str, Any]]:
    """Honest headers of two shards of `seed` by file name."""
    names = list(seed.tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    return {
        f"model-0000{number}-of-00002.safetensors": header_of({name: seed.tensors[name] for name in half})
        for number, half in enumerate(halves, 1)
    }


def load_seeds() -> list[Seed]:
    """All seeds, of families that are supported and of others."""
    seeds = []
    for path in sorted(SEEDS.glob("*.json")):
        data = json.loads(path.read_text())
        tensors = {name: tuple(shape) for name, shape in data["tensors"].items()}
        header = header_of(tensors)
        file = WeightFile(json.dumps(header).encode(), data_bytes_of(header))
        seeds.append(Seed(path.stem, json.dumps(data["config"]), tensors, file))
    return seeds


def dump_entry(entry: Entry) -> str:
    """`entry` as the text of a corpus file; `load_entry` reads it back."""
    files = {name: _dump(content) for name, content in entry.case.files.items()}
    about = {"target": entry.case.target, "rule": entry.rule, "expect": entry.expect, "why": entry.why}
    text = json.dumps({**about, "files": files}, indent=1) + "\n"
    # a newline stands between brackets, never within a text
    return _SHORT_LIST.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


def load_entry(text: str) -> Entry:
    """The entry in the text of a corpus file."""
    data = json.loads(text)
    files = {name: _load(content) for name, content in data["files"].items()}
    return Entry(Case(data["target"], files), data["rule"], data["expect"], data["why"])


def _dump(content: Content) -> dict[str, Any]:
    """An object whose first key says how the bytes are written down: as plainly as they can be read back."""
    if isinstance(content, bytes):
        return _dump_bytes(content)
    sizes = {"claimed": content.claimed, "cut": content.cut}
    more: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    tensors = _tensors_of(content)
    if tensors is not None:
        return {"tensors": tensors, **more}
    return {"header": _dump_bytes(content.header), "data_bytes": content.data_bytes, **more}


def _load(data: dict[str, Any]) -> Content:
    match data:
        case {"tensors": tensors, **more}:
            header = header_of({name: tuple(shape) for name, shape in tensors.items()})
            return WeightFile(json.dumps(header).encode(), data_bytes_of(header), **more)
        case {"header": header, **more}:
            return WeightFile(_load_bytes(header), **more)
    return _load_bytes(data)


def _tensors_of(content: WeightFile) -> dict[str, list[int]] | None:
    """Shapes by name where `content` is the honest file of them."""
    try:
        tree = json.loads(content.header)
        shapes = {name: entry["shape"] for name, entry in tree.items() if name != "__metadata__"}
        header = header_of(shapes)
        honest = (json.dumps(header).encode(), data_bytes_of(header)) == (content.header, content.data_bytes)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None
    return shapes if honest else None


def _dump_bytes(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
    try:
        tree = json.loads(text)
        return {"json": tree} if json.dumps(tree) == text else {"text": text}
    except (ValueError, RecursionError):
        return {"text": text}


def _load_bytes(data: dict[str, Any]) -> bytes:
    match data:
        case {"json": tree}:
            return json.dumps(tree).encode()
        case {"text": text}:
            return bytes(text.encode())
    return base64.b64decode(data["base64"])
