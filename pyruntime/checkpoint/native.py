"""pyruntime's own format: a config.json that holds the whole specification, and tensors named by it.

For models that no family of Hugging Face describes: skipless ones, and what a pass has rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.fields import some
from pyruntime.checkpoint.folder import ReadOptions, StoredTensor, open_tensors, unread_files
from pyruntime.checkpoint.header import MAX_TENSORS
from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.weight import TORCH_DTYPES, TensorRef
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import ModelSpec, MoE, spec_from_json, spec_to_json, weight_shapes

SKIPLESS: Final = "skipless"
REWRITTEN: Final = "pyruntime"
NATIVE_TYPES: Final = (SKIPLESS, REWRITTEN)
FORMAT_VERSION: Final = 1
# of config.json: column maps of a large model take more than another configuration may have
MAX_NATIVE_BYTES: Final = 1 << 24
# taken over as they are: what to do with tokens
TOKEN_KEYS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_CLASSES: Final = {SKIPLESS: "SkiplessForCausalLM", REWRITTEN: "PyruntimeForCausalLM"}
_MAX_FAMILY: Final = 64


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether `config` is of this format."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in NATIVE_TYPES


def native_config(spec: ModelSpec, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of `spec`; `tokens` may hold `TOKEN_KEYS`."""
    model_type = REWRITTEN if _has_residual(spec) else SKIPLESS
    return {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        **{key: tokens[key] for key in TOKEN_KEYS if tokens.get(key) is not None},
        **_repeated(spec),
        "spec": spec_to_json(spec),
    }


def read_native(folder: Path, config: Mapping[str, Any], options: ReadOptions = ReadOptions()) -> Model:
    """The model in `folder`, whose config.json `is_native`; no tensor byte is read.

    Raises UsageError CONFIG for a specification that is none, keys that are not known or contradict it, CheckpointError
    for what the files hold, RunError IO.
    """
    spec = _spec(config, options)
    stored = open_tensors(folder, options)
    shapes = weight_shapes(spec)
    _check(shapes, stored)
    by_dtype: dict[str, int] = {}
    for tensor in stored.values():
        by_dtype[tensor.info.dtype] = by_dtype.get(tensor.info.dtype, 0) + tensor.info.num_bytes
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    return Model(
        spec=spec,
        dense_spec=spec,
        weights={name: _ref(name, stored[name]) for name in shapes},
        dtype=str(TORCH_DTYPES[main]).removeprefix("torch."),
        path=folder,
        config=config,
        notes=unread_files(folder, stored.values()),
    )


def _ref(name: str, tensor: StoredTensor) -> TensorRef:
    info = tensor.info
    return TensorRef(tensor.shard, name, info.dtype, info.shape, info.start, info.num_bytes)


def _spec(config: Mapping[str, Any], options: ReadOptions) -> ModelSpec:
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UsageError(
            "CONFIG", f"config.json: format_version is {str(version)[:80]}; this release reads {FORMAT_VERSION}"
        )
    try:
        spec = spec_from_json(config.get("spec"))
    except UsageError as error:
        raise UsageError("CONFIG", f"config.json: spec: {error}") from None
    if len(spec.family) > _MAX_FAMILY or not spec.family.isprintable():
        raise UsageError(
            "CONFIG", f"config.json: spec: family is no name of at most {_MAX_FAMILY} characters; expected one"
        )
    experts = sum(layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoE))
    if 3 * experts > MAX_TENSORS:
        raise UsageError("CONFIG", f"config.json: spec: {experts} experts are more than {MAX_TENSORS} tensors hold")
    _check_keys(config, spec, options)
    return spec


def _check_keys(config: Mapping[str, Any], spec: ModelSpec, options: ReadOptions) -> None:
    """Every key is known, and what is said twice is said alike."""
    model_type = REWRITTEN if _has_residual(spec) else SKIPLESS
    said = {"model_type": model_type, "architectures": [_CLASSES[model_type]], **_repeated(spec)}
    known = {"format_version", "dtype", "spec", *TOKEN_KEYS, *said, *options.ignore_config_keys}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UsageError("CONFIG", f"config.json has unknown keys: {some(unknown)}; {config['model_type']} has none")
    for key, value in said.items():
        # true is 1 in Python
        if config.get(key, value) != value or type(config.get(key, value)) is not type(value):
            raise UsageError("CONFIG", f"config.json: {key} is {str(config[key])[:80]}; by its spec it is {value}")


def _repeated(spec: ModelSpec) -> dict[str, Any]:
    """What other programs look for at the top of config.json."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embedding.size,
        "num_hidden_layers": len(spec.layers),
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.head.tied,
    }


def _has_residual(spec: ModelSpec) -> bool:
    """Whether any sublayer is added to the stream, or there is none at all."""
    sublayers = [sublayer for layer in spec.layers for _, sublayer in layer.sublayers()]
    return not sublayers or any(sublayer.residual for sublayer in sublayers)


def _check(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> None:
    missing, extra = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - shapes.keys())
    if missing or extra:
        code = "MISSING_TENSOR" if missing else "UNEXPECTED_TENSOR"
        faults = [f"missing: {some(missing)}"] if missing else []
        faults += [f"not in its spec: {some(extra)}"] if extra else []
        raise CheckpointError(code, f"tensors {'; '.join(faults)}; get the checkpoint that config.json was written for")
    wrong = [
        f"{name} is {list(stored[name].info.shape)}, its spec implies {list(shape)}"
        for name, shape in shapes.items()
        if stored[name].info.shape != shape
    ]
    if wrong:
        raise CheckpointError("SHAPE", some(wrong, "; ", 1000))
    for name, tensor in stored.items():
        if tensor.info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                "DTYPE",
                f"{tensor.shard.path.name}: {name} is {tensor.info.dtype}; supported: {', '.join(TORCH_DTYPES)}",
            )
