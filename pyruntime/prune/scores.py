"""Scores: how much a model needs each of its attentions, MLPs and blocks; and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.atomic import write_text
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.prune.identity import KINDS, model_identity
from pyruntime.spec.bounds import MAX_LAYERS

FORMAT: Final = "pyruntime-scores"
VERSION: Final = 1
# the runs of a model of 1024 layers are half a million numbers
MAX_BYTES: Final = 64 * 2**20
# from hidden states, in one pass whatever their number
STATISTICS: Final = ("cosine", "angular", "magnitude")
# a pass for every sublayer
PERPLEXITY: Final = "perplexity"
METRICS: Final = (*STATISTICS, PERPLEXITY)
RUN_METRICS: Final = ("cosine", "angular")

Values = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """`values` by metric, kind ("attention", "mlp", "block") and layer: the lower, the sooner it is dropped.

    None stands where nothing is, or can be, dropped. `runs` are the distances of h_l and h_(l+n) by metric, n and l.
    `model` is the hash of `model_identity`; `dense_nll` the nats per token with nothing dropped, where perplexities
    were measured. The formulas are in docs/pruning.md.
    """

    model: str
    family: str
    num_layers: int
    values: Mapping[str, Mapping[str, Values]]
    runs: Mapping[str, Mapping[int, Values]] = field(default_factory=dict)
    dense_nll: float | None = None
    not_droppable: tuple[str, ...] = ()
    text: str = ""
    text_sha256: str = ""
    tokens_sha256: str = ""
    tokenizer_sha256: str = ""
    seed: int | None = None
    num_seqs: int = 0
    num_tokens: int = 0
    dtype: str = ""
    target: str = ""
    layer_by_layer: bool = False

    def of(self, metric: str, kind: str) -> Values:
        """One value a layer. Raises UsageError SCORES for a metric that was not measured."""
        found = self.values.get(metric, {}).get(kind)
        if found is None:
            there = ", ".join(self.values) or "none"
            raise UsageError("SCORES", f"the scores have no {metric} of {kind}s; they have {there}: score with it")
        return found

    def run(self, metric: str, length: int) -> Values:
        """The distances over runs of `length` layers, by first layer. Raises UsageError SCORES likewise."""
        found = self.runs.get(metric, {}).get(length)
        if found is None:
            raise UsageError(
                "SCORES", f"the scores have no {metric} over runs of {length} layers; score with --runs {length}"
            )
        return found

    def check_model(self, model: Model) -> None:
        """Raise UsageError SCORES unless they were measured on `model`."""
        if self.model != model_identity(model):
            raise UsageError(
                "SCORES",
                f"the scores belong to another model ({self.family}, {self.num_layers} layers, {self.model[:12]}...); "
                "score this one, or leave out the file",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; `from_json` reads it back."""
        whole = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        whole["values"] = {metric: {k: list(v) for k, v in kinds.items()} for metric, kinds in self.values.items()}
        whole["runs"] = {
            metric: {str(n): list(each) for n, each in lengths.items()} for metric, lengths in self.runs.items()
        }
        whole["not_droppable"] = list(self.not_droppable)
        return {"format": FORMAT, "version": VERSION, **whole}

    @classmethod
    def from_json(cls, data: Any) -> Scores:
        """The scores in `data`. Raises UsageError SCORES for anything that is none."""
        names = {each.name: each for each in dataclasses.fields(cls)}
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise _bad(f'no scores; expected an object with "format": "{FORMAT}"')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise _bad(f"version {data.get('version')!r}; this release reads {VERSION}")
        found = {key: value for key, value in data.items() if key not in ("format", "version")}
        if found.keys() != names.keys():
            raise _bad(f"the wrong keys {sorted(found.keys() ^ names.keys())}; expected {', '.join(names)}")
        _check_types(found)
        layers = found["num_layers"]
        found["values"] = {
            _one_of(metric, METRICS): {_one_of(kind, KINDS): _values(each, layers) for kind, each in kinds.items()}
            for metric, kinds in _objects(found["values"])
        }
        found["runs"] = {
            _one_of(metric, RUN_METRICS): {n: _values(each, layers + 1 - n) for n, each in _lengths(lengths, layers)}
            for metric, lengths in _objects(found["runs"])
        }
        found["not_droppable"] = tuple(found["not_droppable"])
        return cls(**found)

    def save(self, path: Path) -> None:
        """Write the JSON file `path`, whole or not at all. Raises RunError IO."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The scores in the file `path`. Raises UsageError SCORES, RunError IO."""
        try:
            return cls.from_json(read_object(path, "SCORES", MAX_BYTES))
        except CheckpointError as error:
            raise UsageError("SCORES", str(error)) from None


_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "model": str,
    "family": str,
    "num_layers": int,
    "dense_nll": (float, int, type(None)),
    "not_droppable": list,
    "text": str,
    "text_sha256": str,
    "tokens_sha256": str,
    "tokenizer_sha256": str,
    "seed": (int, type(None)),
    "num_seqs": int,
    "num_tokens": int,
    "dtype": str,
    "target": str,
}


def _check_types(found: Mapping[str, Any]) -> None:
    for name, kind in _TYPES.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise _bad(f"{name} {str(found[name])[:40]!r}")
    if found["dense_nll"] is not None and not _is_finite(found["dense_nll"]):
        raise _bad(f"dense_nll {str(found['dense_nll'])[:40]}")
    if not isinstance(found["layer_by_layer"], bool) or not 1 <= found["num_layers"] <= MAX_LAYERS:
        raise _bad("layer_by_layer or num_layers out of bounds")
    if not all(isinstance(each, str) and each.isprintable() for each in found["not_droppable"]):
        raise _bad("not_droppable that are no texts")
    if not found["text"].isprintable() or not found["family"].isprintable():
        raise _bad("a name that cannot be printed")


def _objects(value: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise _bad("values or runs that are no objects of objects")
    return list(value.items())


def _one_of(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise _bad(f"the unknown name {name[:40]!r}; expected {', '.join(known)}")
    return name


def _lengths(lengths: dict[str, Any], num_layers: int) -> list[tuple[int, Any]]:
    known = {str(n): n for n in range(1, num_layers + 1)}
    return [(known[_one_of(text, tuple(known))], each) for text, each in lengths.items()]


def _values(value: Any, count: int) -> Values:
    if not isinstance(value, list) or len(value) != count:
        raise _bad(f"a list that does not hold {count} values")
    for each in value:
        if each is not None and not _is_finite(each):
            raise _bad(f"the value {str(each)[:40]!r}; expected finite numbers, or null where nothing can be dropped")
    return tuple(None if each is None else float(each) for each in value)


def _is_finite(value: Any) -> bool:
    # JSON has no NaN, but 1e999 is infinite, and an integer may be larger than any float
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _bad(found: str) -> UsageError:
    return UsageError("SCORES", f"the scores file has {found}; score again")
