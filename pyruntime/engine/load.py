"""From the name of a model to everything an engine needs: model, plan, tokenizer, defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pyruntime import env
from pyruntime.checkpoint import Model, read_model, resolve_model
from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.engine.capture import MemoryBudget, memory_budget, warm_up, warm_up_prefill
from pyruntime.engine.engine import Engine, EngineConfig, largest_step
from pyruntime.engine.memory import available_memory, check_memory
from pyruntime.engine.params import INT64_MAX, eos_token_ids, unused_settings
from pyruntime.engine.schedule import SchedulerConfig
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import RunError, UsageError
from pyruntime.graph import build, fuse
from pyruntime.ops.gpu.batch import BatchSizes
from pyruntime.passes import drop, make_drop_plan
from pyruntime.passes.drop import Layers
from pyruntime.plan import DTYPES, Plan, lower, resolve_device
from pyruntime.spec import DropPlan, ModelSpec, RopeKind

PAGE_SIZE: Final = 16
# of the memory that is free once the weights are in place
_CACHE_SHARE: Final = 0.4
# looking for NaN costs a tenth of reading; in models beyond this only if asked for
_CHECKED_BYTES: Final = 4 * 10**9
_LOGGER: Final = logging.getLogger("pyruntime")


def _check_int(name: str, value: object, low: int, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= INT64_MAX:
        raise UsageError("CONFIG", f"{name} is {value!r}; expected an integer from {low} to {INT64_MAX}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DropOptions:
    """What to leave out, in every way a user can say it (see passes.make_drop_plan)."""

    drop_attn: Layers | None = None
    drop_mlp: Layers | None = None
    drop_block: Layers | None = None
    drop_plan: DropPlan | Mapping[str, Any] | str | Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Sizes of an engine; None lets the model and the machine decide."""

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        # raises for what it refuses
        SchedulerConfig(self.max_num_seqs, self.max_num_batched_tokens)
        # a token of the prompt and one of the answer
        _check_int("max_model_len", self.max_model_len, 2, or_none=True)
        _check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, or_none=True)
        _check_int("seed", self.seed, -INT64_MAX - 1)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError("CONFIG", f"gpu_memory_utilization is {share!r}; expected a share above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model on its plan, with its tokenizer (None where it was not asked for) and the defaults of its author."""

    model: Model
    plan: Plan
    tokenizer: Tokenizer | None
    generation_config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]


def read_pruned(
    name: str | Path,
    drops: DropOptions,
    revision: str | None = None,
    options: ReadOptions = ReadOptions(),
    *,
    warn: bool = True,
) -> Model:
    """The model called `name` without what it declares as dropped and without what `drops` names; no byte is read.

    Its notes are logged as warnings, unless the caller shows them itself (`warn` False).
    """
    # the level is the host's own, unless the environment says otherwise
    if (level := env.logging_level()) is not None:
        _LOGGER.setLevel(level)
    model = pruned(read_model(resolve_model(name, revision), options), drops)
    for note in model.notes:
        # a dtype conflict is an error, or settled by the dtype that was asked for
        if warn and note != model.dtype_conflict:
            _LOGGER.warning("%s: %s", name, note)
    return model


def pruned(model: Model, drops: DropOptions) -> Model:
    """The model without what `drops` names. Raises UsageError DROP for layers that it does not have."""
    plan = make_drop_plan(
        model.spec,
        drop_attn=drops.drop_attn,
        drop_mlp=drops.drop_mlp,
        drop_block=drops.drop_block,
        drop_plan=drops.drop_plan,
    )
    left = drop(model, plan) if plan else model
    notes = _said_twice(model.spec, drops) + _all_gone(left.spec)
    if (conflict := left.dtype_conflict) != model.dtype_conflict:
        # what differed may be gone
        left = replace(left, notes=tuple(note for note in left.notes if note != model.dtype_conflict))
        notes += (conflict,) if conflict is not None else ()
    return replace(left, notes=left.notes + notes) if notes else left


def _said_twice(spec: ModelSpec, drops: DropOptions) -> tuple[str, ...]:
    """A note on sublayers that go with their layer and are also named alone."""
    if drops.drop_block is None or (drops.drop_attn is None and drops.drop_mlp is None):
        return ()
    whole = make_drop_plan(spec, drop_block=drops.drop_block, drop_plan=drops.drop_plan)
    alone = make_drop_plan(spec, drop_attn=drops.drop_attn, drop_mlp=drops.drop_mlp, drop_plan=drops.drop_plan)
    named = make_drop_plan(spec, drop_plan=drops.drop_plan)
    twice = [
        f"{kind} {index}"
        for kind in ("attention", "mlp")
        for index in sorted(set(getattr(whole, kind)) & set(getattr(alone, kind)) - set(getattr(named, kind)))
    ]
    return (f"named alone and with the layer, dropped once: {', '.join(twice)}",) if twice else ()


def _all_gone(spec: ModelSpec) -> tuple[str, ...]:
    """A note where no attention or no MLP is left: legal, and seldom meant."""
    gone = {kind for kind in ("attention", "mlp") if len(spec.dropped(kind)) == len(spec.layers)}
    if len(gone) == 2:
        return ("every layer is dropped whole; embedding, last norm and head remain",)
    return (f"every {'attention' if 'attention' in gone else 'MLP'} is dropped",) if gone else ()


def load(
    name: str | Path,
    *,
    drops: DropOptions = DropOptions(),
    dtype: str = "auto",
    target: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    skip_tokenizer_init: bool = False,
    options: ReadOptions = ReadOptions(),
    check_weights: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Read, prune, build, fuse and lower the model called `name`.

    `target` "auto" is the best that runs whole plans here. `check_weights` looks for NaN and infinity in what is read;
    None: in models of up to 4 GB. `progress` is called with (bytes read, bytes in all).
    Raises the errors of each stage, and RunError MEMORY before weights that do not fit are read.
    """
    _check_names(name, dtype=dtype, target=target, device=device)
    if check_weights is not None and not isinstance(check_weights, bool):
        raise UsageError("CONFIG", f"check_weights is {check_weights!r}; expected True, False or None")
    device = resolve_device(device, target)
    model = read_pruned(name, drops, revision, options)
    assert model.path is not None
    tokenizer = None if skip_tokenizer_init else Tokenizer(model.path)
    if tokenizer is not None:
        tokenizer.check_vocab(model.spec.vocab_size)
    generation_config = _generation_config(model.path, name, with_text=tokenizer is not None)
    eos = _eos(name, model, generation_config, tokenizer)
    stored = DTYPES.get(model.dtype if dtype == "auto" else dtype)
    if stored is not None:
        check_memory(model.num_values * stored.itemsize, f"loading {name}", device)
    done, total = 0, model.weight_bytes

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    plan = lower(
        fuse(build(model.spec)),
        model,
        target=target,
        dtype=dtype,
        device=device,
        check_weights=model.weight_bytes <= _CHECKED_BYTES if check_weights is None else check_weights,
        progress=count,
    )
    _LOGGER.debug("plan of %s:\n%s", name, plan.explain())
    return Loaded(model=model, plan=plan, tokenizer=tokenizer, generation_config=generation_config, eos_token_ids=eos)


def _eos(
    name: str | Path, model: Model, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Ids that end a sequence. Raises UsageError for one beyond the embedding."""
    eos = eos_token_ids(generation_config, model.config)
    if not eos and tokenizer is not None and tokenizer.eos_id is not None:
        eos = (tokenizer.eos_id,)
    for token_id in eos:
        if token_id >= model.spec.vocab_size:
            raise UsageError(
                "CONFIG",
                f"{name}: eos_token_id is {token_id}; the embedding has ids 0 to {model.spec.vocab_size - 1}; correct "
                "generation_config.json or config.json",
            )
    return eos


def make_engine(
    loaded: Loaded,
    sizes: EngineSizes = EngineSizes(),
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = _LOGGER.info,
) -> Engine:
    """An engine over the loaded plan, with a cache as large as asked for or as the machine allows.

    On a GPU its decode steps are captured; `progress` is called with (batch sizes captured, batch sizes in all), `say`
    with a line on what takes how much of its memory.
    Raises UsageError for a context that the model was not made for, RunError MEMORY for a cache that does not fit.
    """
    spec = loaded.model.spec
    length = spec.max_position if sizes.max_model_len is None else sizes.max_model_len
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= spec.max_position:
        kinds = {a.rope.kind for _, a in spec.attentions() if a.rope is not None}
        changing = sorted(kinds & {RopeKind.DYNAMIC, RopeKind.LONGROPE})
        why = f"; {changing[0]!r} rope would change keys that are cached already" if changing else ""
        raise UsageError(
            "CONFIG", f"max_model_len is {length!r}; the model was made for 1 to {spec.max_position} tokens{why}"
        )
    scheduler = SchedulerConfig(sizes.max_num_seqs, sizes.max_num_batched_tokens)
    config = EngineConfig(
        max_model_len=length,
        num_pages=_num_pages(loaded.plan, length, sizes, say),
        page_size=PAGE_SIZE,
        seed=sizes.seed,
        scheduler=scheduler,
    )
    warm_up_prefill(loaded.plan, largest_step(config), PAGE_SIZE)
    engine = Engine(loaded.plan, config, loaded.tokenizer, loaded.eos_token_ids)
    warm_up(loaded.plan, sizes.max_num_seqs, progress)
    return engine


def _num_pages(plan: Plan, max_model_len: int, sizes: EngineSizes, say: Callable[[str], None]) -> int:
    per_sequence = -(-max_model_len // PAGE_SIZE)
    useful = per_sequence * sizes.max_num_seqs
    page_bytes = plan.kv_bytes_per_token * PAGE_SIZE
    if page_bytes == 0:
        return useful
    if sizes.kv_cache_memory_bytes is not None:
        pages = sizes.kv_cache_memory_bytes // page_bytes
        if pages < 1:
            raise UsageError(
                "CONFIG", f"kv_cache_memory_bytes is {sizes.kv_cache_memory_bytes}; a page takes {page_bytes}"
            )
        pages = min(pages, useful)
        check_memory(pages * page_bytes, f"a KV cache of {pages} pages", str(plan.device))
        return pages
    budget = _budget(plan, per_sequence, sizes)
    available = _memory_for_cache() if budget is None else budget.kv_cache
    pages = useful if available is None else min(useful, available // page_bytes)
    if pages < per_sequence:
        raise RunError(
            "MEMORY",
            f"one sequence of {max_model_len} tokens needs {per_sequence * page_bytes / 2**30:.2f} GiB of KV cache; "
            f"{pages * page_bytes / 2**30:.2f} GiB are free for it: lower max_model_len",
        )
    if budget is not None:
        say(str(budget.with_cache(pages * page_bytes)))
    return pages


def _budget(plan: Plan, per_sequence: int, sizes: EngineSizes) -> MemoryBudget | None:
    """What takes the memory of the GPU that runs the plan, or None where there is none."""
    if plan.gpu is None or plan.device.type != "cuda":
        return None
    rows = sizes.max_num_batched_tokens
    largest = BatchSizes(rows, rows, sizes.max_num_seqs, per_sequence)
    return memory_budget(plan, largest, PAGE_SIZE, sizes.gpu_memory_utilization)


def _memory_for_cache() -> int | None:
    """Bytes of the machine's memory that the KV cache may take, or None where that cannot be known."""
    available = available_memory()
    return None if available is None else int(available * _CACHE_SHARE)


def _generation_config(folder: Path, name: object, *, with_text: bool) -> Mapping[str, Any]:
    """What the author recommends and can be done; the rest is said."""
    path = folder / "generation_config.json"
    config = read_object(path, "CONFIG") if is_there(path) else {}
    unused = unused_settings(config)
    if not with_text and config.get("stop_strings"):
        # found in the text, which there is none of
        unused += ("stop_strings (it needs the tokenizer)",)
        config = {**config, "stop_strings": None}
    if unused:
        _LOGGER.warning("%s: generation_config.json has settings that are not used: %s", name, ", ".join(unused)[:1000])
    return config


def _check_names(name: object, **texts: object) -> None:
    if not isinstance(name, str | Path):
        raise UsageError("MODEL", f"model is {name!r}; expected a folder or a Hub id")
    for what, value in texts.items():
        if not isinstance(value, str):
            raise UsageError("CONFIG", f"{what} is {value!r}; expected text")
    if str(texts["device"]).partition(":")[0] == "meta":
        raise UsageError("DEVICE", f"device {texts['device']!r} holds no values; expected cpu, or cuda")
