"""Gains, biases and means of norms, moved into the linear maps around them (FlashNorm, Graef et al., 2407.09577)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import exact
from pyruntime.passes.fold.draft import Draft
from pyruntime.passes.fold.maps import map_inputs, map_norms, map_outputs, raw_inputs
from pyruntime.passes.fold.matrices import scale_inputs, through
from pyruntime.spec import MLP, Attention, Linear, MoE, Norm, NormKind, Sublayer

Spread = Callable[[torch.Tensor], torch.Tensor]

ONE_PLUS: Final = (NormKind.RMS_ONE_PLUS, NormKind.LAYER_ONE_PLUS)
_CENTRED: Final = {NormKind.LAYER: NormKind.RMS, NormKind.LAYER_ONE_PLUS: NormKind.RMS_ONE_PLUS}
_PLAIN: Final = {NormKind.RMS_ONE_PLUS: NormKind.RMS, NormKind.LAYER_ONE_PLUS: NormKind.LAYER}


def fold_norms(model: Model) -> Model:
    """`model` whose norms have no gain and no bias wherever every reader of a norm is a linear map.

    y = W (g n + b) + c becomes y = (W diag(g)) n + (c + W b), g being 1 + weight for some kinds (proposition 1 of
    arXiv 2407.09577). A gain of ones and a bias of zeros vanish everywhere; for this the vectors of all norms are read.
    """
    draft = Draft.of(model)
    _remove_units(draft)
    for kind, index, prefix, sublayer in draft.sublayers():
        where = f"{kind} {index}"
        pre = sublayer.pre
        if pre is not None and has_parameters(pre):
            reason = raw_inputs(sublayer)
            if reason is not None:
                draft.leave(reason, f"{where} pre")
            else:
                changed = map_inputs(sublayer, prefix, partial(_absorb, draft, pre, f"{prefix}pre"))
                sublayer = replace(changed, pre=without_parameters(pre))
                draft.rewritten.append(f"{where} pre")
        draft.put(kind, index, _fold_inner(draft, where, prefix, sublayer))
    _fold_final_norm(draft)
    return draft.finish("fold norms")


def centre_layer_norms(model: Model) -> Model:
    """`model` whose LayerNorms are RMSNorms, because whatever writes the stream writes values of mean zero.

    V* = V - mean over outputs of V, likewise for biases, embeddings and learned positions (section 3.5 of arXiv
    2407.09577). All or nothing: the stream has mean zero only if every writer gives it, and only a LayerNorm does not
    see that the mean is gone.
    """
    draft = Draft.of(model)
    obstacles = _obstacles(draft)
    if obstacles:
        draft.notes.extend(obstacles)
        return draft.finish("centre layer norms")
    names = ["embedding", *(["embedding.position"] if draft.embedding.positions is not None else [])]
    for name in names:
        table = draft.weights[f"{name}.weight"]
        draft.compute(f"{name}.weight", tuple(table.shape), table, partial(_centre, 1), table)
    for kind, index, prefix, sublayer in draft.sublayers():
        sublayer = map_outputs(sublayer, prefix, partial(_centre_outputs, draft))
        if sublayer.pre is not None:
            sublayer = replace(sublayer, pre=replace(sublayer.pre, kind=_CENTRED[sublayer.pre.kind]))
            draft.rewritten.append(f"{kind} {index} pre")
        draft.put(kind, index, sublayer)
    assert draft.final_norm is not None
    draft.final_norm = replace(draft.final_norm, kind=_CENTRED[draft.final_norm.kind])
    draft.rewritten.append("final norm")
    return draft.finish("centre layer norms")


def has_parameters(norm: Norm) -> bool:
    """Whether `norm` has a gain or a bias."""
    return norm.weight or norm.bias


def without_parameters(norm: Norm) -> Norm:
    """`norm` without gain and bias; without a gain, 1 + weight is no kind of its own."""
    return replace(norm, kind=_PLAIN.get(norm.kind, norm.kind), weight=False, bias=False)


def _absorb(
    draft: Draft, norm: Norm, norm_name: str, name: str, linear: Linear, spread: Spread = lambda values: values
) -> Linear:
    """The map `name` behind a norm, with the norm's gain and bias inside; `spread` lays them along the map's inputs."""
    weight, bias = draft.weights[f"{name}.weight"], f"{name}.bias"
    if norm.weight:
        offset = float(norm.kind in ONE_PLUS)
        draft.compute(
            f"{name}.weight",
            linear.weight_shape,
            weight,
            lambda stored, gain: scale_inputs(linear, stored, spread(gain + offset)),
            weight,
            draft.weights[f"{norm_name}.weight"],
        )
    if norm.bias:
        own = (draft.weights[bias],) if linear.bias else ()
        draft.compute(
            bias,
            (linear.out_features,),
            weight,
            lambda stored, shift, *rest: through(linear, stored, spread(shift), *rest),
            weight,
            draft.weights[f"{norm_name}.bias"],
            *own,
        )
    return replace(linear, bias=linear.bias or norm.bias)


def _remove_units(draft: Draft) -> None:
    """Forget gains that are one and biases that are zero everywhere."""

    def look(name: str, norm: Norm) -> Norm:
        unit = 0.0 if norm.kind in ONE_PLUS else 1.0
        gain = norm.weight and not bool((exact(draft.weights[f"{name}.weight"]) == unit).all())
        bias = norm.bias and bool(exact(draft.weights[f"{name}.bias"]).any())
        if (gain, bias) != (norm.weight, norm.bias):
            draft.rewritten.append(f"{name} (did nothing)")
        return replace(norm, kind=norm.kind if gain else _PLAIN.get(norm.kind, norm.kind), weight=gain, bias=bias)

    for kind, index, prefix, sublayer in draft.sublayers():
        draft.put(kind, index, map_norms(sublayer, prefix, look))
    if draft.final_norm is not None:
        draft.final_norm = look("final_norm", draft.final_norm)


def _fold_inner(draft: Draft, where: str, prefix: str, sublayer: Sublayer) -> Sublayer:
    """Fold the norms behind the first maps; note those that have no map behind them."""
    match sublayer:
        case Attention():
            sublayer = _fold_values(draft, where, prefix, sublayer)
            for name in ("q_norm", "k_norm"):
                if _left(getattr(sublayer, name)):
                    draft.leave("scores stand behind it, no linear map", f"{where} {name}")
            if sublayer.o is None and _left(sublayer.sub):
                draft.leave("no output projection stands behind it", f"{where} sub")
            elif sublayer.sub is not None and sublayer.o is not None:
                o, sub = _fold_sub(draft, where, f"{prefix}sub", sublayer.sub, f"{prefix}o", sublayer.o)
                sublayer = replace(sublayer, o=o, sub=sub)
        case MLP() if sublayer.sub is not None:
            down, sub = _fold_sub(draft, where, f"{prefix}sub", sublayer.sub, f"{prefix}down", sublayer.down)
            sublayer = replace(sublayer, down=down, sub=sub)
        case MoE() if sublayer.shared is not None:
            shared = _fold_inner(draft, f"{where} shared", f"{prefix}shared.", sublayer.shared)
            assert isinstance(shared, MLP)
            sublayer = replace(sublayer, shared=shared)
    if _left(sublayer.post):
        draft.leave("the residual add stands behind it, no linear map", f"{where} post")
    return sublayer


def _fold_sub(draft: Draft, where: str, name: str, norm: Norm, map_name: str, linear: Linear) -> tuple[Linear, Norm]:
    if not has_parameters(norm):
        return linear, norm
    draft.rewritten.append(f"{where} sub")
    return _absorb(draft, norm, name, map_name, linear), without_parameters(norm)


def _fold_values(draft: Draft, where: str, prefix: str, attention: Attention) -> Attention:
    """The norm of the values into the output projection: softmax mixes positions and leaves channels alone."""
    norm, o = attention.v_norm, attention.o
    if norm is None or not has_parameters(norm):
        return attention
    obstacle = (
        "no output projection stands behind it"
        if o is None
        else "another norm stands behind it"
        if attention.sub is not None
        else "the weights of shaped attention do not add up to one"
        if norm.bias and attention.shaped
        else None
    )
    if o is None or obstacle is not None:
        draft.leave(str(obstacle), f"{where} v_norm")
        return attention
    draft.rewritten.append(f"{where} v_norm")
    spread = partial(over_query_heads, attention)
    o = _absorb(draft, norm, f"{prefix}v_norm", f"{prefix}o", o, spread)
    return replace(attention, o=o, v_norm=without_parameters(norm))


def over_query_heads(attention: Attention, values: torch.Tensor) -> torch.Tensor:
    """`values` of one head, or of all key-value heads, as what each query head's output meets, [q_size]."""
    heads = values.expand(attention.num_kv_heads, -1) if len(values) == attention.head_dim else values
    heads = heads.reshape(attention.num_kv_heads, attention.head_dim)
    return heads.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=0).flatten()


def _fold_final_norm(draft: Draft) -> None:
    norm = draft.final_norm
    if norm is None or not has_parameters(norm):
        return
    if draft.head.tied:
        draft.leave("the head is tied to the embedding, which must not change", "final norm")
        return
    draft.head = replace(draft.head, linear=_absorb(draft, norm, "final_norm", "head", draft.head.linear))
    draft.final_norm = without_parameters(norm)
    draft.rewritten.append("final norm")


def _left(norm: Norm | None) -> bool:
    return norm is not None and has_parameters(norm)


def _obstacles(draft: Draft) -> list[str]:
    """Why LayerNorms stay: what reads a mean of the stream, or writes one that no map can lose."""
    final, found = draft.final_norm, []
    kinds = [norm.kind for each in draft.sublayers() if (norm := each[3].pre) is not None]
    if not any(kind in _CENTRED for kind in (*kinds, *([final.kind] if final is not None else []))):
        return ["the stream has no LayerNorm"]
    if final is None or final.kind not in _CENTRED:
        found.append("the head reads the stream through no LayerNorm")
    elif draft.head.tied and has_parameters(final):
        found.append("the head is tied to the embedding, whose rows it must not lose the mean of")
    for kind, index, _, sublayer in draft.sublayers():
        where, pre = f"{kind} {index}", sublayer.pre
        reads = not (isinstance(sublayer, Attention) and sublayer.table)
        if reads and (pre is None or pre.kind not in _CENTRED):
            found.append(f"{where} reads the stream through no LayerNorm")
        if sublayer.post is not None:
            found.append(f"{where} writes through a norm")
        elif isinstance(sublayer, Attention) and sublayer.o is None:
            found.append(f"{where} writes without an output projection")
        elif any(linear.triangular for linear in _outputs(sublayer)):
            found.append(f"{where} writes through a triangular map")
        if sublayer.shortcut is not None:
            found.append(f"{where} has a matrix on its residual")
    return found


def _outputs(sublayer: Sublayer) -> list[Linear]:
    found: list[Linear] = []

    def note(_: str, linear: Linear) -> Linear:
        found.append(linear)
        return linear

    map_outputs(sublayer, "", note)
    return found


def _centre_outputs(draft: Draft, name: str, linear: Linear) -> Linear:
    for part in ("weight", "bias") if linear.bias else ("weight",):
        own = draft.weights[f"{name}.{part}"]
        # outputs lie along the first dimension of both
        draft.compute(f"{name}.{part}", tuple(own.shape), own, partial(_centre, 0), own)
    return linear


def _centre(axis: int, values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(dim=axis, keepdim=True)
