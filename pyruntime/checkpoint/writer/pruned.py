"""A compact checkpoint: what a drop plan leaves of another one, every kept tensor copied byte for byte."""

from __future__ import annotations

import bisect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyruntime.checkpoint.dialects.plan_file import read_plan
from pyruntime.checkpoint.folder import ReadOptions, StoredTensor, open_tensors
from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.native import is_native, native_config
from pyruntime.checkpoint.reader import read_as, read_model
from pyruntime.checkpoint.weight import TensorRef, Weight
from pyruntime.checkpoint.writer.copied import origin_of
from pyruntime.checkpoint.writer.dialects import WriteDialect, config_in, exact_in, silenced, write_dialect
from pyruntime.checkpoint.writer.folder import new_folder
from pyruntime.checkpoint.writer.weights import SHARD_BYTES, NewTensor, stored_bytes
from pyruntime.checkpoint.writer.whole import Written, check_spec, native_text, write_whole
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import DropPlan, ModelSpec, MoE, Sublayer, drop_sublayers, sublayer_prefix, weight_shapes

# (first byte in its file, number of bytes) by stored tensor
_Ranges = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What is to be written: config.json, the tensors to keep, what of them becomes zero, what it reads as in whom."""

    config: bytes
    exact_in: tuple[str, ...]
    names: frozenset[str]
    expected: ModelSpec
    zeros: _Ranges


def write_pruned(
    source: Path,
    plan: DropPlan,
    out: Path,
    *,
    dialect: str = "hf",
    config_only: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    made: Mapping[str, Any] | None = None,
    read: ReadOptions = ReadOptions(),
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the checkpoint `source` without what `plan` names as the new folder `out`, whole or not at all.

    What `source` declares as dropped stays so. Kept tensors keep names, dtypes and bytes. The `dialect` "hf" says what
    is gone in `per_layer_config` and in LLM-Drop's lists, "llm-drop" in the lists alone; "zeros" keeps all tensors and
    lets dropped sublayers give zero, for readers that know no drops. With `config_only` no weights are written: the
    folder is a drop plan for its source. `made` goes into the manifest; `progress` is called with (bytes done, bytes in
    all), of writing and of hashing. The input is never touched. Raises UsageError OUTPUT, DIALECT or DROP,
    CheckpointError for a bad source or a result that would read as something else, RunError LOCKED or IO.
    """
    said = write_dialect(dialect)
    with new_folder(out, sources=[source], overwrite=overwrite, wait=wait) as folder:
        model = read_model(source, read)
        if config_only:
            _refuse_without_weights(said, model)
        stored = open_tensors(source, read)
        make = _contents_native if is_native(model.config) else _contents
        contents = make(model, plan, said, _Files(stored), read)
        kept = {name: each for name, each in stored.items() if name in contents.names and not config_only}
        about = {
            "format": f"{said}, config only" if config_only else str(said),
            "exact_in": ["pyruntime, as a drop plan"] if config_only else list(contents.exact_in),
            "plan": plan.to_json(),
            "from": origin_of(source, {each.shard.path.name for each in stored.values()}),
        }
        check = partial(check_spec, expected=contents.expected, options=read)
        if config_only:
            check = partial(_check_plan, base=model.dense_spec, expected=contents.expected)
        write_whole(
            folder,
            [_tensor(name, each, contents.zeros.get(name, ())) for name, each in kept.items()],
            contents.config,
            source,
            {**about, **(made or {})},
            check,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    num_bytes = sum(each.info.num_bytes for each in kept.values())
    return Written(path=out, num_tensors=len(kept), weight_bytes=num_bytes, notes=folder.notes)


class _Files:
    """Which stored tensor a weight, or a part of it, lies in: by its place, since some are read under another name."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        places = [(each.shard.path.name, each.info.start, name) for name, each in stored.items() if each.info.num_bytes]
        self._places = sorted(places)

    def holder(self, ref: TensorRef) -> str:
        """Name of the stored tensor."""
        # behind all that begin where the part begins, whatever they are called
        found = bisect.bisect_right(self._places, (ref.shard.path.name, ref.start, chr(sys.maxunicode)))
        return self._places[found - 1][2]


def _contents(model: Model, plan: DropPlan, dialect: WriteDialect, files: _Files, read: ReadOptions) -> _Contents:
    spec = drop_sublayers(model.spec, plan)
    gone = silenced(model.config, plan)
    config = config_in(dialect, model.config, gone)
    text = (json.dumps(config, indent=2) + "\n").encode()
    zeros: _Ranges = {}
    if dialect is WriteDialect.ZEROS:
        model = _dense(model, config, read)
        spec, zeros = model.spec, _zeros(model, gone, files)
    readers = exact_in(dialect, config, gone)
    return _Contents(config=text, exact_in=readers, names=_names(model, spec, files), expected=spec, zeros=zeros)


def _contents_native(
    model: Model, plan: DropPlan, dialect: WriteDialect, files: _Files, read: ReadOptions
) -> _Contents:
    if dialect is WriteDialect.LLM_DROP:
        raise UsageError("DIALECT", f"LLM-Drop cannot read model_type {model.config['model_type']}; choose dialect hf")
    spec = drop_sublayers(model.spec, plan)
    zeros: _Ranges = {}
    if dialect is WriteDialect.ZEROS:
        spec, zeros = model.spec, _zeros(model, plan, files)
    config = native_config(spec, model.dtype, model.config)
    return _Contents(
        config=native_text(config),
        exact_in=exact_in(dialect, config, plan),
        names=_names(model, spec, files),
        expected=spec,
        zeros=zeros,
    )


def _dense(model: Model, config: Mapping[str, Any], read: ReadOptions) -> Model:
    """The model with what its configuration says is dropped."""
    assert model.path is not None, "it was just read"
    try:
        return read_as(model.path, config, read)
    except CheckpointError as error:
        if error.code != "MISSING_TENSOR":
            raise
        # its last words say what to do about another fault
        found = str(error).rpartition(";")[0]
        raise CheckpointError(
            error.code, f"dialect zeros keeps all tensors, and {found}; write it from the unpruned checkpoint"
        ) from None


def _names(model: Model, spec: ModelSpec, files: _Files) -> frozenset[str]:
    """The stored tensors that the weights of `spec`, which may be less than the model, lie in."""
    return frozenset(files.holder(ref) for name in weight_shapes(spec) for ref in _refs(model.weights[name]))


def _refs(weight: Weight) -> Iterator[TensorRef]:
    # weights that no tensor holds come from the configuration
    yield from (ref for ref in weight.refs() if isinstance(ref, TensorRef))


def _zeros(model: Model, gone: DropPlan, files: _Files) -> _Ranges:
    """Where the weights lie whose zeros let the sublayers in `gone` add zero."""
    found: dict[str, list[tuple[int, int]]] = {}
    for kind in ("attention", "mlp"):
        for index in getattr(gone, kind):
            sublayer = getattr(model.spec.layers[index], kind)
            prefix = sublayer_prefix(index, kind)
            names = () if sublayer is None else _outputs(sublayer, f"{kind} {index}")
            for weight in (model.weights[prefix + name] for name in names if prefix + name in model.weights):
                for ref in _refs(weight):
                    found.setdefault(files.holder(ref), []).extend(_ranges(ref))
    return found


def _ranges(ref: TensorRef) -> list[tuple[int, int]]:
    if ref.stride is None:
        return [(ref.start, ref.num_bytes)]
    rows = ref.shape[0]
    return [(ref.start + row * ref.stride, ref.num_bytes // rows) for row in range(rows)]


def _outputs(sublayer: Sublayer, where: str) -> Iterator[str]:
    """Names of the weights, where they exist, that are zero if the sublayer is to add zero."""
    if isinstance(sublayer, MoE):
        lasts = [f"experts.{expert}.down" for expert in range(sublayer.num_experts)]
        lasts += ["shared.down"] if sublayer.shared is not None else []
    else:
        lasts = [each for each in ("o", "down", "linear") if getattr(sublayer, each, None) is not None]
    if not lasts:
        raise UsageError("DIALECT", f"{where} has no last map that could be zero; choose dialect hf")
    yield from (f"{last}.{end}" for last in lasts for end in ("weight", "bias"))
    # a norm of zeros gives its bias; its gain may be what it is
    yield "post.bias"


def _tensor(name: str, stored: StoredTensor, zeros: Sequence[tuple[int, int]]) -> NewTensor:
    info = stored.info
    return NewTensor(name, info.dtype, info.shape, info.num_bytes, partial(_chunks, stored, zeros))


def _chunks(stored: StoredTensor, zeros: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
    begin = stored.info.start
    for chunk in stored_bytes(stored):
        for start, count in zeros:
            low, high = max(start - begin, 0), min(start + count - begin, len(chunk))
            if low < high:
                chunk[low:high] = bytes(high - low)
        yield chunk
        begin += len(chunk)


def _refuse_without_weights(dialect: WriteDialect, model: Model) -> None:
    if dialect is WriteDialect.ZEROS:
        raise UsageError(
            "DIALECT", "dialect is 'zeros', which cannot do without weights (config_only); choose hf or llm-drop"
        )
    if is_native(model.config):
        raise UsageError(
            "DIALECT",
            f"{model.path} is in pyruntime's own format, which cannot do without weights (config_only); "
            "write it with them",
        )


def _check_plan(folder: Path, base: ModelSpec, expected: ModelSpec) -> None:
    """Raise CheckpointError WRITER where the folder, as a plan for its base, drops something else."""
    if drop_sublayers(base, read_plan(folder, base)) != expected:
        raise CheckpointError("WRITER", "what was written reads as another plan")
