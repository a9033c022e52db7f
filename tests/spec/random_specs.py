"""Random specifications for property tests: all kinds of sublayers, absent ones, merged projections, other widths."""

from __future__ import annotations

from hypothesis import strategies as st

from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
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
    return Linear(in_features=in_size, out_features=out_size, bias=draw(st.booleans()))


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
def attentions(draw: st.DrawFn, size: int, residual: bool) -> Attention:
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = kv_heads * group
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    # a projection can be merged away only where its output is as wide as its input
    absent = {name for name, width in (("q", q_size), ("k", kv_size), ("v", kv_size)) if width == size}
    absent = {name for name in sorted(absent) if draw(st.booleans())}
    out_size = size if residual else draw(st.integers(1, 12))
    merged_o = q_size == out_size and draw(st.booleans())

    def project(name: str, width: int) -> Linear | None:
        return None if name in absent else draw(linears(size, width))

    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        q=project("q", q_size),
        k=project("k", kv_size),
        v=project("v", kv_size),
        o=None if merged_o else draw(linears(q_size, out_size)),
        scale=draw(reals),
        rope=draw(st.none() | ropes(head_dim)),
        window=draw(st.none() | st.integers(1, 1 << 24)),
        softcap=draw(st.none() | reals),
        q_norm=draw(st.none() | norms(head_dim) | norms(q_size)),
        k_norm=draw(st.none() | norms(head_dim) | norms(kv_size)),
        pre=draw(st.none() | norms(size)),
        sub=draw(st.none() | norms(q_size)),
        post=draw(st.none() | norms(out_size)),
        residual=residual,
    )


@st.composite
def mlps(draw: st.DrawFn, size: int, residual: bool) -> MLP:
    wide, out_size = draw(st.integers(1, 20)), size if residual else draw(st.integers(1, 12))
    return MLP(
        gate=draw(st.none() | linears(size, wide)),
        up=draw(linears(size, wide)),
        down=draw(linears(wide, out_size)),
        activation=draw(st.sampled_from(Activation)),
        pre=draw(st.none() | norms(size)),
        sub=draw(st.none() | norms(wide)),
        post=draw(st.none() | norms(out_size)),
        residual=residual,
    )


@st.composite
def replacements(draw: st.DrawFn, size: int, residual: bool) -> Replacement:
    out_size = size if residual else draw(st.integers(1, 12))
    return Replacement(
        linear=draw(linears(size, out_size)),
        pre=draw(st.none() | norms(size)),
        post=draw(st.none() | norms(out_size)),
        residual=residual,
    )


@st.composite
def specs(draw: st.DrawFn, skipless: bool = True) -> ModelSpec:
    """Any ModelSpec; without `skipless` every sublayer has its residual, so that everything may be dropped."""
    size = width = draw(st.sampled_from([2, 4, 6, 8]))
    vocab = draw(st.integers(1, 50))
    layers: list[Layer] = []
    for index in range(draw(st.integers(1, 4))):
        parallel = draw(st.booleans())
        chosen = []
        for kind in (attentions, mlps):
            residual = parallel or not skipless or draw(st.booleans())
            sublayer = draw(st.none() | kind(width, residual) | replacements(width, residual))
            width = width if sublayer is None else sublayer.out_size
            chosen.append(sublayer)
        layers.append(Layer(index=index, attention=chosen[0], mlp=chosen[1], parallel=parallel))
    return ModelSpec(
        family=draw(st.sampled_from(["llama", "skipless"])),
        embedding=Embedding(vocab_size=vocab, size=size, scale=draw(reals)),
        layers=tuple(layers),
        final_norm=draw(st.none() | norms(width)),
        head=Head(
            linear=draw(linears(width, vocab)),
            tied=width == size and draw(st.booleans()),
            softcap=draw(st.none() | reals),
        ),
        max_position=draw(st.integers(1, 1 << 24)),
    )
