"""What a caller may ask of one generation: names, defaults and bounds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final

from pyruntime.errors import UsageError

INT32_MAX: Final = 2**31 - 1
INT64_MAX: Final = 2**63 - 1
MAX_N: Final = 16
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 128
MAX_LOGPROBS: Final = 20
MAX_TOKEN_IDS: Final = 1024

# field -> (lowest, highest); a field not listed may not be None
_INT_BOUNDS: Final = {
    "n": (1, MAX_N),
    "top_k": (-1, INT32_MAX),
    "seed": (-INT64_MAX - 1, INT64_MAX),
    "max_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_MAY_BE_NONE: Final = ("seed", "max_tokens", "logprobs", "prompt_logprobs")

# field -> (lowest, highest, whether the lowest value itself is refused)
_FLOAT_BOUNDS: Final = {
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 10.0, True),
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
}
_BOOLS: Final = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
# key of generation_config.json -> field
_FROM_GENERATION_CONFIG: Final = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# keys that are used elsewhere, or that change no token here
_QUIET_SETTINGS: Final = frozenset(
    "_from_model_config transformers_version do_sample bos_token_id eos_token_id pad_token_id decoder_start_token_id "
    "max_length use_cache cache_implementation cache_config return_legacy_cache output_scores output_logits "
    "output_attentions output_hidden_states return_dict_in_generate".split()
)
# keys whose neutral value is one; every other one's is nothing: 0, false or empty
_ONE_IS_NEUTRAL: Final = frozenset(
    "num_beams num_beam_groups num_return_sequences length_penalty typical_p encoder_repetition_penalty "
    "guidance_scale".split()
)

_LOGGER: Final = logging.getLogger("pyruntime")


def _refuse(name: str, found: object, expected: str) -> UsageError:
    return UsageError("PARAMS", f"{name} is {_short(found)}; expected {expected}")


def _short(value: object) -> str:
    # a value comes from a request: it must not make a message of a megabyte
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python is willing to print
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_int(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(name, value, f"an integer from {low} to {high}")
    return int(value)


def _checked_float(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """`value` as a float without a negative zero; NaN fails both comparisons and is refused like infinity."""
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not inside or (open_low and value == low):
        raise _refuse(name, value, f"a number {'above' if open_low else 'from'} {low:g} {'up ' * open_low}to {high:g}")
    return float(value) + 0.0  # type: ignore[arg-type]


def _checked_ids(name: str, value: object, limit: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _refuse(name, value, "a list of token ids")
    if len(value) > limit:
        raise UsageError("PARAMS", f"{name} has {len(value)} entries; expected at most {limit}")
    return tuple(_checked_int(f"{name}[{i}]", token_id, 0, INT32_MAX) for i, token_id in enumerate(value))


def _checked_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise _refuse("stop", value, "a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise UsageError("PARAMS", f"stop has {len(value)} strings; expected at most {MAX_STOPS}")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise _refuse(f"stop[{i}]", text, f"a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(value)


def _checked_bias(value: object) -> Mapping[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", value, "a dict from token id to a number")
    if len(value) > MAX_TOKEN_IDS:
        raise UsageError("PARAMS", f"logit_bias has {len(value)} entries; expected at most {MAX_TOKEN_IDS}")
    checked = {
        _checked_int("logit_bias key", token_id, 0, INT32_MAX): _checked_float(
            f"logit_bias[{token_id}]", bias, -100.0, 100.0
        )
        for token_id, bias in value.items()
    }
    return MappingProxyType(checked) if checked else None


@functools.cache
def _warn_alias_once() -> None:
    _LOGGER.warning("max_new_tokens is accepted as another name of max_tokens; use max_tokens (said once)")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request, with vLLM's names and defaults. Every value is checked; `UsageError("PARAMS")` if bad.

    `temperature=0` is greedy. `top_k` 0 and -1 are off. `max_tokens=None` means as many as the context holds; a larger
    number means no more than that either.
    `stop` and `stop_token_ids` are tuples once constructed, whatever was given; `logit_bias` is read-only.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    # a read-only mapping has no hash; two params that differ only here merely share a bucket
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _INT_BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                self._set(name, _checked_int(name, value, low, high))
        for name, (lowest, highest, open_low) in _FLOAT_BOUNDS.items():
            self._set(name, _checked_float(name, getattr(self, name), lowest, highest, open_low))
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "true or false")
        self._set("stop", _checked_stop(self.stop))
        stop_ids = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", _checked_ids("stop_token_ids", stop_ids, MAX_TOKEN_IDS))
        self._set("logit_bias", _checked_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _checked_ids("allowed_token_ids", self.allowed_token_ids, 2**20))
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        # the one place that writes, during construction only
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _refuse("allowed_token_ids", [], "at least one token id, or None to allow all")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise _refuse("stop", self.stop, "none when detokenize is false: stop strings are found in the text")

    def __reduce__(self) -> tuple[Any, ...]:
        # the default cannot pickle or deep-copy the read-only mapping
        values = tuple(getattr(self, f.name) for f in fields(self))
        plain = tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in values)
        return (type(self), plain)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple it has become."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as the tuple it has become."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    @property
    def greedy(self) -> bool:
        """Whether the highest logit is always taken."""
        return self.temperature == 0.0

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UsageError unless every token id named here is one of the model's `vocab_size` ids."""
        named: tuple[tuple[str, Iterable[int]], ...] = (
            ("stop_token_ids", self.stop_ids),
            ("logit_bias", self.logit_bias or ()),
            ("allowed_token_ids", self.allowed_token_ids or ()),
        )
        for name, ids in named:
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _refuse(f"a token id in {name}", token_id, f"one from 0 to {vocab_size - 1}")

    @classmethod
    def create(cls, **kwargs: Any) -> SamplingParams:
        """Params by keyword, where `max_new_tokens` (transformers, SGLang) is another name of `max_tokens`.

        Raises UsageError for an unknown name, and when both names are given.
        """
        known = {f.name for f in fields(cls)}
        if "max_new_tokens" in kwargs:
            if "max_tokens" in kwargs:
                raise UsageError("PARAMS", "both max_tokens and max_new_tokens are given; expected one: use max_tokens")
            _warn_alias_once()
            kwargs["max_tokens"] = kwargs.pop("max_new_tokens")
        unknown = sorted(str(name) for name in kwargs if name not in known)
        if unknown:
            raise UsageError(
                "PARAMS", f"unknown sampling parameter {_short(unknown[0])}; expected one of {', '.join(sorted(known))}"
            )
        return cls(**kwargs)

    @classmethod
    def defaults_from(cls, generation_config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """The params that a model's generation_config.json recommends; `overrides` (as for `create`) win over it.

        `do_sample: false` means greedy, whatever temperature stands beside it. `min_new_tokens` gives way to a smaller
        `max_tokens`. Null keys are left alone, `unused_settings` names the rest. Raises UsageError for a value out of
        bounds, naming it.
        """
        values = {
            field: generation_config[name]
            for name, field in _FROM_GENERATION_CONFIG.items()
            if generation_config.get(name) is not None
        }
        if generation_config.get("do_sample") is False:
            values["temperature"] = 0.0
        if "max_new_tokens" in overrides:
            values.pop("max_tokens", None)
        least = None if "min_tokens" in overrides else values.pop("min_tokens", None)
        found = cls.create(**{**values, **overrides})
        if isinstance(least, int) and not isinstance(least, bool) and found.max_tokens is not None:
            least = min(least, found.max_tokens)
        return found if least is None else replace(found, min_tokens=least)


def unused_settings(generation_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a generation_config.json that would change the tokens and are not obeyed, as `key=value`."""
    unused = []
    for name, value in generation_config.items():
        known = name in _FROM_GENERATION_CONFIG or name in _QUIET_SETTINGS
        if value and not known and not (name in _ONE_IS_NEUTRAL and value == 1):
            # as Python writes it, without the quotes: a file may hold anything
            unused.append(f"{_short(name)[1:-1]}={_short(value)}")
    return tuple(unused)


def eos_token_ids(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: `eos_token_id` of generation_config.json if it is there, else that of config.json.

    An int or a list of ints, returned in the file's order without repeats; empty when neither file names one.
    Raises UsageError for anything else.
    """
    for where, source in (("generation_config.json", generation_config), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        name = f"eos_token_id of {where}"
        ids = _checked_ids(name, [value] if _is_int(value) else value, MAX_TOKEN_IDS)
        return tuple(dict.fromkeys(ids))
    return ()
