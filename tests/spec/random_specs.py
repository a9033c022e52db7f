"""Random specifications for property tests: all kinds of sublayers, absent ones, merged projections, other widths."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Cached,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    NormKind,
    Replacement,
    Rope,
    RopeKind,
)

reals = st.floats(1e-3, 1e3)


@st.composite
def norms(draw: st.DrawFn, size: int) -> Norm:
    return Norm(
        kind=draw(st.sampled_from(NormKind)),
        size=size,
        eps=draw(st.floats(1e-12, 1.0)),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def linears(draw: st.DrawFn, in_size: int, out_size: int) -> Linear:
    triangular = in_size == out_size and draw(st.booleans())
    return Linear(in_features=in_size, out_features=out_size, bias=draw(st.booleans()), triangular=triangular)


@st.composite
def ropes(draw: st.DrawFn, head_dim: int) -> Rope:
    kind = draw(st.sampled_from(RopeKind))
    long = kind not in (RopeKind.DEFAULT, RopeKind.LINEAR)
    yarn = kind is RopeKind.YARN
    dim = draw(st.sampled_from(range(2, head_dim + 1, 2)))
    divisors = st.lists(st.floats(0.5, 64.0), min_size=dim // 2, max_size=dim // 2).map(tuple)
    return Rope(
        kind=kind,
        dim=dim,
        theta=draw(st.floats(1.5, 1e6)),
        factor=draw(st.floats(0.5, 64.0)),
        original_max_position=draw(st.integers(1, 1 << 24)) if long else None,
        low_freq_factor=draw(st.floats(0.5, 1.0)) if kind is RopeKind.LLAMA3 else None,
        high_freq_factor=draw(st.floats(1.5, 8.0)) if kind is RopeKind.LLAMA3 else None,
        beta_fast=draw(reals) if yarn else None,
        beta_slow=draw(reals) if yarn else None,
        attention_factor=draw(reals) if kind in (RopeKind.YARN, RopeKind.LONGROPE) else None,
        truncate=draw(st.booleans()),
        divisors=draw(divisors) if kind is RopeKind.LONGROPE else None,
    )


@st.composite
def sources(draw: st.DrawFn, size: int, out_size: int, q_size: int, kv_size: int) -> dict[str, Any]:
    """Where queries, keys and values come from: projections, columns of the input and of `rest`, or a table."""
    kind = draw(st.sampled_from(["projections", "columns", "table", *Cached]))
    width = q_size + 2 * kv_size
    if kind == "columns":
        known = size + draw(st.integers(max(1, width - size), width + 2))
        columns = tuple(draw(st.permutations(range(known)))[:width])
        return {"q": None, "k": None, "v": None, "columns": columns, "rest": draw(linears(size, known - size))}
    if kind == "table" and size == out_size:
        return {"q": None, "k": None, "v": None, "table": True, "pre": None}
    cached = kind if isinstance(kind, Cached) else Cached.KEYS_VALUES
    found: dict[str, Any] = {"cached": cached}
    for name, width in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        source = kv_size if (name, cached) == ("v", Cached.KEYS) else size
        # a projection can be merged away only where its output is as wide as its input
        needed = name != "q" and cached is not Cached.KEYS_VALUES
        merged = width == size and not needed and draw(st.booleans())
        found[name] = None if merged else draw(linears(source, width))
    return found


@st.composite
def residuals(draw: st.DrawFn, size: int, out_size: int, residual: bool, shortcut: bool) -> dict[str, Any]:
    """Fields of a residual, with a map on it where one is allowed."""
    return {"residual": residual, "shortcut": draw(linears(size, out_size)) if shortcut else None}


@st.composite
def attentions(draw: st.DrawFn, size: int, residual: bool, out_size: int, shortcut: bool) -> Attention:
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = kv_heads * group
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    merged_o = q_size == out_size and draw(st.booleans())
    fields = {"pre": draw(st.none() | norms(size)), **draw(sources(size, out_size, q_size, kv_size))}
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        o=None if merged_o else draw(linears(q_size, out_size)),
        scale=draw(reals),
        rope=draw(st.none() | ropes(head_dim)),
        window=draw(st.none() | st.integers(1, 1 << 24)),
        softcap=draw(st.none() | reals),
        q_norm=draw(st.none() | norms(head_dim) | norms(q_size)),
        k_norm=draw(st.none() | norms(head_dim) | norms(kv_size)),
        v_norm=draw(st.none() | norms(head_dim) | norms(kv_size)),
        shaped=draw(st.booleans()),
        alibi=draw(st.booleans()),
        sub=draw(st.none() | norms(q_size)),
        post=draw(st.none() | norms(out_size)),
        **draw(residuals(size, out_size, residual, shortcut)),
        **fields,
    )


@st.composite
def mlps(draw: st.DrawFn, size: int, residual: bool, out_size: int, shortcut: bool) -> MLP:
    wide = draw(st.integers(1, 20))
    return MLP(
        gate=draw(st.none() | linears(size, wide)),
        up=draw(linears(size, wide)),
        down=draw(linears(wide, out_size)),
        activation=draw(st.sampled_from(Activation)),
        pre=draw(st.none() | norms(size)),
        sub=draw(st.none() | norms(wide)),
        post=draw(st.none() | norms(out_size)),
        **draw(residuals(size, out_size, residual, shortcut)),
    )


@st.composite
def replacements(draw: st.DrawFn, size: int, residual: bool, out_size: int, shortcut: bool) -> Replacement:
    return Replacement(
        linear=draw(linears(size, out_size)),
        pre=draw(st.none() | norms(size)),
        post=draw(st.none() | norms(out_size)),
        **draw(residuals(size, out_size, residual, shortcut)),
    )


@st.composite
def specs(draw: st.DrawFn, skipless: bool = True) -> ModelSpec:
    """Any ModelSpec; without `skipless` every sublayer has its plain residual, so that everything may be dropped."""
    size = width = draw(st.sampled_from([2, 4, 6, 8]))
    vocab = draw(st.integers(1, 50))
    layers: list[Layer] = []
    for index in range(draw(st.integers(1, 4))):
        parallel = draw(st.booleans())
        chosen: list[Any] = []
        entry, residual, shared = width, not skipless or draw(st.booleans()), draw(st.integers(1, 12))
        for kind in (attentions, mlps):
            if not parallel:
                entry, residual = width, not skipless or draw(st.booleans())
            # a map on the residual may change the width too
            shortcut = residual and skipless and not parallel and draw(st.booleans())
            free = shared if parallel else draw(st.integers(1, 12))
            out_size = entry if residual and not shortcut else free
            needs = (entry, residual, out_size, shortcut)
            sublayer = draw(st.none() | kind(*needs) | replacements(*needs))
            width = width if sublayer is None else sublayer.out_size
            chosen.append(sublayer)
        layers.append(Layer(index=index, attention=chosen[0], mlp=chosen[1], parallel=parallel))
    linear = draw(linears(width, vocab))
    # a tied head is the embedding, which has no triangular form
    tied = width == size and not linear.triangular and draw(st.booleans())
    max_position = draw(st.integers(1, 1 << 24))
    positions = draw(st.none() | st.integers(max_position, 1 << 24))
    return ModelSpec(
        family=draw(st.sampled_from(["llama", "skipless"])),
        embedding=Embedding(vocab_size=vocab, size=size, scale=draw(reals), positions=positions),
        layers=tuple(layers),
        final_norm=draw(st.none() | norms(width)),
        head=Head(linear=linear, tied=tied, softcap=draw(st.none() | reals)),
        max_position=max_position,
    )
