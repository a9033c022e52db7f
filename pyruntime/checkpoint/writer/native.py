"""Any model to a folder in pyruntime's own format, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.native import native_config
from pyruntime.checkpoint.weight import TORCH_DTYPES, TensorRef, Weight
from pyruntime.checkpoint.writer.copied import origin_of
from pyruntime.checkpoint.writer.folder import new_folder
from pyruntime.checkpoint.writer.weights import SHARD_BYTES, NewTensor, tensor_bytes
from pyruntime.checkpoint.writer.whole import Written, check_spec, native_text, write_whole
from pyruntime.errors import RunError, UsageError
from pyruntime.spec import weight_shapes

_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in _NAMES}


def write_native(
    model: Model,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    wait: bool = False,
    made: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write `model` as the new folder `out`, whole or not at all, in pyruntime's own format.

    `dtype` (float32, float16, bfloat16) is what the weights are rounded to; without it each keeps its own, and float64
    ones become what the model's checkpoint is stored in. `made` goes into the manifest. Tokenizer and the like are
    copied from `files_from`, or the folder that the model was read from. `progress` is called with (bytes done, bytes
    in all), of writing and of hashing. Raises UsageError OUTPUT or DTYPE, RunError NUMERICS for weights that are not
    finite, RunError LOCKED or IO, and what reading the weights raises.
    """
    sources = [path for path in (model.path, files_from) if path is not None]
    tensors = [_tensor(name, model.weights[name], model.dtype, dtype) for name in weight_shapes(model.spec)]
    config = native_config(model.spec, _main_dtype(tensors), model.config)
    about: dict[str, Any] = {"format": str(config["model_type"]), "exact_in": ["pyruntime"]}
    with new_folder(out, sources=sources, overwrite=overwrite, wait=wait) as folder:
        if model.path is not None:
            about["from"] = origin_of(model.path, _files(model))
        write_whole(
            folder,
            tensors,
            native_text(config),
            model.path if files_from is None else files_from,
            {**about, **(made or {})},
            partial(check_spec, expected=model.spec),
            shard_bytes=shard_bytes,
            progress=progress,
        )
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Written(path=out, num_tensors=len(tensors), weight_bytes=num_bytes, notes=folder.notes)


def _tensor(name: str, weight: Weight, model_dtype: str, dtype: str | None) -> NewTensor:
    wanted = _DTYPES.get(dtype) if dtype is not None else _own_dtype(weight) or _DTYPES.get(model_dtype)
    if wanted is None:
        raise UsageError(
            "DTYPE", f"weights of dtype {dtype or model_dtype!r} cannot be stored; expected one of {', '.join(_DTYPES)}"
        )
    size = torch.Size(weight.shape).numel() * wanted.itemsize
    return NewTensor(name, _NAMES[wanted], weight.shape, size, partial(_chunks, name, weight, wanted))


def _own_dtype(weight: Weight) -> torch.dtype | None:
    """The one dtype that the parts of `weight` are in, if a file can hold it."""
    found = {TORCH_DTYPES[ref.dtype] if isinstance(ref, TensorRef) else ref.read().dtype for ref in weight.refs()}
    return found.pop() if len(found) == 1 and found <= _NAMES.keys() else None


def _chunks(name: str, weight: Weight, dtype: torch.dtype) -> Iterator[memoryview]:
    tensor = weight.read().to(dtype)
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise RunError(
            "NUMERICS",
            f"{name} has values that are NaN or infinite as {str(dtype).removeprefix('torch.')}; choose another dtype",
        )
    yield tensor_bytes(tensor)


def _main_dtype(tensors: list[NewTensor]) -> str:
    """The dtype of most bytes."""
    num_bytes: dict[str, int] = {}
    for tensor in tensors:
        num_bytes[tensor.dtype] = num_bytes.get(tensor.dtype, 0) + tensor.num_bytes
    return str(TORCH_DTYPES[max(num_bytes, key=lambda each: num_bytes[each])]).removeprefix("torch.")


def _files(model: Model) -> set[str]:
    refs = {ref for weight in model.weights.values() for ref in weight.refs()}
    return {ref.shard.path.name for ref in refs if isinstance(ref, TensorRef)}
