"""From the names and shapes that a specification needs to references into the files: by family, by piece, lazily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pyruntime.checkpoint.as_stored import Stored
from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.fields import some
from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.checkpoint.weight import TORCH_DTYPES, Rows, TensorRef, Transposed, UnitRows, Weight
from pyruntime.errors import CheckpointError
from pyruntime.spec import EXPERT_MAPS, Attention, ModelSpec, MoE, weight_shapes

_DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where weights lie: one stored tensor of `parts`, each `heads` runs of rows that alternate between the parts.

    Where it is `transposed`, parts are runs of columns.
    """

    name: str
    parts: tuple[str, ...]
    heads: int
    transposed: bool
    unit_rows: bool


def bind(checkpoint: Stored) -> tuple[dict[str, Weight], str]:
    """The weights of a checkpoint's model by name, and the dtype of most of their bytes.

    Raises CheckpointError MISSING_TENSOR, UNEXPECTED_TENSOR (a tensor that not even the whole model has), SHAPE, DTYPE.
    """
    spec, whole, family, stored = checkpoint.spec, checkpoint.whole, checkpoint.family, checkpoint.tensors
    given = checkpoint.given
    _check_experts(spec, stored)
    shapes = weight_shapes(spec)
    places = {place.name: place for place in _places(spec, family, [name for name in shapes if name not in given])}
    known = {
        place.name for place in _places(whole, family, [name for name in weight_shapes(whole) if name not in given])
    }
    _check_names(set(places), known, family, stored)
    _check_shapes(places.values(), shapes, stored)
    weights: dict[str, Weight] = dict(given)
    num_bytes: Counter[str] = Counter()
    for place in places.values():
        shard, info = stored[place.name].shard, stored[place.name].info
        tensor = TensorRef(shard, place.name, info.dtype, info.shape, info.start, info.num_bytes)
        weights.update(_cut(tensor, place, shapes))
        num_bytes[info.dtype] += info.num_bytes
    return {name: weights[name] for name in shapes}, _DTYPE_NAMES[num_bytes.most_common(1)[0][0]]


def _check_experts(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse what a few digits of config.json promise before a name is made for each."""
    count = sum(layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoE))
    if len(EXPERT_MAPS) * count > len(stored):
        raise CheckpointError(
            "MISSING_TENSOR",
            f"config.json says {count} experts of {len(EXPERT_MAPS)} tensors each, and the files hold {len(stored)} "
            "tensors in all; get the checkpoint that config.json was written for",
        )


def _places(spec: ModelSpec, family: Family, weights: Iterable[str]) -> list[_Place]:
    places = []
    for weight in weights:
        parts, interleaved = family.fused_with(weight)
        if weight == parts[0]:
            heads = _kv_heads(spec, weight) if interleaved else 1
            turned, unit_rows = family.is_transposed(weight), family.has_unit_rows(weight)
            places.append(_Place(family.tensor_name(weight), parts, heads, turned, unit_rows))
    return places


def _kv_heads(spec: ModelSpec, weight: str) -> int:
    attention = spec.layers[int(weight.split(".")[1])].attention
    assert isinstance(attention, Attention)
    return attention.num_kv_heads


def _cut(whole: TensorRef, place: _Place, shapes: Mapping[str, Shape]) -> dict[str, Weight]:
    """The parts of a stored tensor."""
    if place.unit_rows:
        return {place.parts[0]: UnitRows(whole)}
    if place.transposed:
        return _cut_columns(whole, place, shapes)
    if len(place.parts) == 1:
        return {place.parts[0]: whole}
    runs = [shapes[part][0] // place.heads for part in place.parts]
    stride = sum(runs)
    found: dict[str, Weight] = {}
    for i, part in enumerate(place.parts):
        begin = sum(runs[:i])
        pieces = tuple(whole.rows(head * stride + begin, runs[i]) for head in range(place.heads))
        found[part] = pieces[0] if len(pieces) == 1 else Rows(pieces)
    return found


def _cut_columns(whole: TensorRef, place: _Place, shapes: Mapping[str, Shape]) -> dict[str, Weight]:
    if len(place.parts) == 1:
        return {place.parts[0]: Transposed(whole)}
    found: dict[str, Weight] = {}
    begin = 0
    for part in place.parts:
        width = shapes[part][0]
        found[part] = Transposed(whole.columns(begin, width))
        begin += width
    return found


def _check_names(wanted: set[str], known: set[str], family: Family, stored: Mapping[str, StoredTensor]) -> None:
    missing = sorted(wanted - set(stored))
    known = known | {family.tensor_name("head.weight")}
    extra = sorted(name for name in set(stored) - known if not any(part in name for part in family.stale))
    faults = [f"{_tensors(missing, 'is', 'are')} missing: {some(missing)}"] if missing else []
    faults += [f"{_tensors(extra, 'does', 'do')} not belong to this architecture: {some(extra)}"] if extra else []
    if faults:
        code = "MISSING_TENSOR" if missing else "UNEXPECTED_TENSOR"
        raise CheckpointError(code, f"{'; '.join(faults)}; get the checkpoint that config.json was written for")


def _tensors(names: list[str], one: str, several: str) -> str:
    return f"1 tensor {one}" if len(names) == 1 else f"{len(names)} tensors {several}"


def _check_shapes(places: Iterable[_Place], shapes: Mapping[str, Shape], stored: Mapping[str, StoredTensor]) -> None:
    wrong = []
    for place in places:
        found = stored[place.name].info
        expected = (sum(shapes[part][0] for part in place.parts), *shapes[place.parts[0]][1:])
        if place.transposed:
            expected = expected[::-1]
        if found.shape != expected:
            file = stored[place.name].shard.path.name
            wrong.append(f"{place.name} in {file} is {list(found.shape)}, config.json implies {list(expected)}")
    if wrong:
        count = f"{len(wrong)} tensors have another shape: " if len(wrong) > 1 else ""
        raise CheckpointError("SHAPE", f"{count}{some(wrong, '; ', 1000)}")
    for place in places:
        info = stored[place.name].info
        if info.dtype not in TORCH_DTYPES:
            file = stored[place.name].shard.path.name
            raise CheckpointError(
                "DTYPE", f"{file}: {place.name} is {info.dtype}; supported: {', '.join(TORCH_DTYPES)}"
            )
