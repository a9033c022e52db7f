"""What the tensors of a checkpoint say beyond its config.json: roles by the configuration, shapes by the files.

Only where a method leaves no other sign: weightless norms (FlashNorm), biases beside pruned heads and widths (FLAP),
matrices on the residual of a narrower stream (SliceGPT), a prefix of all names, the head of a tied model. All else that
differs from config.json is an error of `bind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pyruntime.checkpoint.dialects.declared import KIND_OF, Overrides
from pyruntime.checkpoint.dialects.flap import biased, flap
from pyruntime.checkpoint.dialects.flash_norm import weightless_roles
from pyruntime.checkpoint.dialects.slice_gpt import NORM_EPS, gains, is_sliced, sliced, without_dummies
from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.fields import Fields
from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.checkpoint.weight import Weight
from pyruntime.spec import MLP, Attention, Layer, ModelSpec, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A model beside the tensors of its files.

    `dense` is `spec` before anything was dropped, `whole` that with no-ops too. `given` are weights that no tensor
    holds, by our names.
    """

    spec: ModelSpec
    dense: ModelSpec
    whole: ModelSpec
    family: Family
    tensors: Mapping[str, StoredTensor]
    given: Mapping[str, Weight] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def changed(self, change: Callable[[ModelSpec], ModelSpec]) -> Stored:
        """The same with `change` made to all three specifications."""
        return replace(self, spec=change(self.spec), dense=change(self.dense), whole=change(self.whole))

    def noted(self, note: str) -> Stored:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))


def as_stored(stored: Stored, fields: Fields, overrides: Overrides) -> Stored:
    """`stored` as its tensors say that it is; `overrides` are the sizes by layer that config.json lists.

    Raises UsageError CONFIG or DROP, CheckpointError MISSING_TENSOR or SHAPE, where files and configuration disagree.
    """
    stored = _with_head(_without_prefix(stored))
    if is_sliced(stored.whole, stored.family, stored.tensors):
        return _sliced(stored, fields)
    return _weightless(_with_biases(stored, overrides), fields)


def _without_prefix(stored: Stored) -> Stored:
    prefix = stored.family.prefix
    if not prefix or any(name.startswith(prefix) for name in stored.tensors):
        return stored
    names = {ours: theirs.removeprefix(prefix) for ours, theirs in stored.family.names.items()}
    return replace(stored, family=replace(stored.family, names=names))


def _with_head(stored: Stored) -> Stored:
    """What a tied head means where the files hold one all the same: as transformers reads them, and a note."""
    name = stored.family.tensor_name
    head, embedding = name("head.weight"), name("embedding.weight")
    if not stored.spec.head.tied or head not in stored.tensors:
        return stored
    if embedding not in stored.tensors:
        note = f"the head is tied; {head} serves as embedding too"
        tensors = {**stored.tensors, embedding: stored.tensors[head]}
        return replace(stored, tensors=tensors).noted(note)
    # transformers ties two stored tensors only if they are equal, so the stored head is right in either case
    note = f"config.json ties the head, but {head} is stored beside {embedding}; the stored head is used"
    return stored.changed(lambda spec: replace(spec, head=replace(spec.head, tied=False))).noted(note)


def _sliced(stored: Stored, fields: Fields) -> Stored:
    family, width = stored.family, stored.spec.embedding.size
    tensors = without_dummies(stored.tensors)
    note = f"SliceGPT: the stream is {width} values wide in config.json and narrower in the files"
    if fields.raw("rms_norm_eps", NORM_EPS) != NORM_EPS:
        note += f"; its norms have an epsilon of {NORM_EPS:g}, whatever rms_norm_eps says"
    new = replace(stored, tensors=tensors).changed(lambda spec: sliced(spec, family, tensors))
    return replace(new, given=gains(new.spec, width)).noted(note)


def _with_biases(stored: Stored, overrides: Overrides) -> Stored:
    family, tensors = stored.family, stored.tensors
    biases = biased(stored.whole, family, tensors)
    if not biases:
        return stored
    sized = {(index, KIND_OF[name]) for index, keys in overrides.items() for name in keys}
    new = stored.changed(lambda spec: flap(spec, family, tensors, biases, sized))
    counts = [sum(each == kind for _, each in biases) for kind in ("attention", "mlp")]
    note = f"FLAP: biases on the last map of {counts[0]} attentions and {counts[1]} MLPs are in the files alone"
    if _sizes(new.whole) != _sizes(stored.whole):
        note += ", and so are heads and widths that differ from those of config.json"
    return new.noted(note)


def _sizes(spec: ModelSpec) -> list[tuple[int, ...]]:
    """What FLAP prunes, by sublayer."""
    sublayers = [sublayer for layer in spec.layers for _, sublayer in layer.sublayers()]
    heads = [(each.num_heads, each.num_kv_heads) for each in sublayers if isinstance(each, Attention)]
    return [*heads, *((each.up.out_features,) for each in sublayers if isinstance(each, MLP))]


def _weightless(stored: Stored, fields: Fields) -> Stored:
    roles = weightless_roles(stored.spec, stored.family, stored.tensors, fields)
    if not roles:
        return stored

    def change(spec: ModelSpec) -> ModelSpec:
        layers = tuple(_without_gains(layer, roles) for layer in spec.layers)
        final = _without_gain(spec.final_norm) if "final_norm" in roles else spec.final_norm
        return replace(spec, layers=layers, final_norm=final)

    named = ", ".join(sorted(role.replace("_", " ") for role in roles))
    note = f"no norm of {named} has a weight in the files; they are run without (FlashNorm)"
    return stored.changed(change).noted(note)


def _without_gains(layer: Layer, roles: frozenset[str]) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    if attention is not None and "attention" in roles:
        attention = replace(attention, pre=_without_gain(attention.pre))
    if mlp is not None and "mlp" in roles:
        mlp = replace(mlp, pre=_without_gain(mlp.pre))
    return replace(layer, attention=attention, mlp=mlp)


def _without_gain(norm: Norm | None) -> Norm | None:
    return None if norm is None else replace(norm, weight=False)
