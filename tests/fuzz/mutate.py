"""From (target, seed, number) to a case: a valid input with a few edits that know its structure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final

from tests.checkpoint.craft import SINGLE
from tests.fuzz.cases import CONFIG, MAPPING, PLAN, Case, Seed
from tests.fuzz.edits import Twin, edit_anything, edit_bytes, hostile, slots, to_text
from tests.fuzz.mutate_weights import make_header, make_index, num_edits

_PLAN_WORDS: Final = (
    "format version drop_attn_list drop_mlp_list origin num_hidden_layers mha mlp 0 1 3 4 slices sources model "
    "layer_range merge_method parameters scale filter value per_layer_config block_configs intermediate_size"
).split()
# one of every kind of file that says what goes, for a model of four layers
_PLANS: Final = (
    '{"format": "pyruntime-drop-plan", "version": 1, "drop_attn_list": [2, 0], "drop_mlp_list": [3], "origin": "x"}',
    '{"num_hidden_layers": 4, "drop_attn_list": [2, 0], "drop_mlp_list": [false, true, false, false]}',
    '{"num_hidden_layers": 4, "per_layer_config": {"1": {"skip": ["attention"]}}, "_name_or_path": "x/Drop1Attn"}',
    '{"2": [["mha", 1], ["mlp", 0]]}',
    '{"0": 0, "1": 1, "3": 2}',
    "[0, 1, 3]",
    "[0, 1, 3, 5, 7]",
    '{"slices": [{"sources": [{"model": "a/b", "layer_range": ["0", "2"]}]}, {"sources": [{"model": "a/b", '
    '"layer_range": ["2", "4"], "parameters": {"scale": [{"filter": "o_proj", "value": "0"}, {"value": "1"}]}}]}], '
    '"merge_method": "passthrough", "dtype": "bfloat16"}',
)
_YAML_TOKENS: Final = (
    b"&a ", b"*a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ", b"!x ", b"!!int ", b"%YAML 9.9\n",
    b"\n---\n", b"\n...\n", b"? ", b"- ", b"| ", b"> ", b"#", b"\t", b"@", b"`", b"\x00", b"\\x1b", b"\\ud800",
    b"\\U0010ffff", b"\\U00110000", b": ", b"\xff",
)  # fmt: skip
_CONFIG_WORDS: Final = (
    "model_type architectures num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size max_position_embeddings rms_norm_eps layer_norm_eps tie_word_embeddings "
    "attention_bias mlp_bias hidden_act hidden_activation rope_theta rope_scaling rope_parameters "
    "partial_rotary_factor rope_type type factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim truncate "
    "sliding_window use_sliding_window max_window_layers layer_types attn_logit_softcapping "
    "final_logit_softcapping query_pre_attn_scalar logit_scale embedding_multiplier residual_multiplier "
    "attention_multiplier logits_scaling quantization_config block_configs per_layer_config drop_attn_list "
    "drop_mlp_list skip auto_map trust_remote_code _attn_implementation_internal torch_dtype dtype use_cache "
    "pretraining_tp attention_dropout initializer_range transformers_version bos_token_id eos_token_id "
    "pad_token_id clip_qkv qk_norm use_qk_norm parallel_attn alibi no_op replace_with_linear ffn_mult "
    "n_heads_in_group attention ffn num_experts num_local_experts n_embd n_layer n_head activation_function "
    "use_parallel_residual rotary_pct rotary_emb_base scale_attn_weights unheard_of subblock_configs kind "
    "num_kv_heads num_query_heads qk_head_dim v_head_dim name window_length num_sink_tokens sparsify "
    "layer_head_num layer_inter_size num_key_value_heads_per_layer short_factor long_factor skipless merged "
    "use_bidirectional_attention"
).split()
_ROPES: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "mrope", "ntk", "")
_LAYER_KEYS: Final = (
    "0",
    "1",
    "2",
    "00",
    "01",
    "-1",
    "1.0",
    " 1",
    "1e0",
    "٣",
    "²",
    "",
    "999999",
    "9" * 5000,
    "first",
    "0x1",
)


def make_case(target: str, seed: int, number: int, seeds: Sequence[Seed]) -> Case:
    """Case `number` of the stream `seed`; the same arguments give the same case."""
    rng = Random(f"{seed}:{target}:{number}")
    return _MAKERS[target](rng, seeds[rng.randrange(len(seeds))])


def _make_config(rng: Random, seed: Seed) -> Case:
    config = json.loads(seed.config)
    for _ in range(num_edits(rng)):
        if rng.random() < 0.5:
            edit_anything(rng, config, _CONFIG_WORDS)
        else:
            rng.choice(_CONFIG_EDITS)(rng, config)
    text = to_text(config, rng.random() < 0.8)
    if rng.random() < 0.05:
        text = edit_bytes(rng, text)
    return Case("config", {CONFIG: text, SINGLE: seed.file}, seed.name)


def _set_key(rng: Random, config: dict[str, Any]) -> None:
    config[rng.choice(_CONFIG_WORDS)] = hostile(rng)


def _set_lists(rng: Random, config: dict[str, Any]) -> None:
    config[rng.choice(("drop_attn_list", "drop_mlp_list"))] = _layer_list(rng)


def _layer_list(rng: Random) -> Any:
    length = rng.choice((0, 1, 2, 3, 4, 1024))
    match rng.randrange(4):
        case 0:
            return [rng.random() < 0.5 for _ in range(length)]
        case 1:
            return [rng.randrange(-1, 5) for _ in range(length)]
        case 2:
            return [rng.choice((0, 1, True, False, 1.0, "1", None, 2)) for _ in range(length)]
        case _:
            return list(range(length))


def _set_overrides(rng: Random, config: dict[str, Any]) -> None:
    kinds = ["attention", "mlp", "mixer", "attention", "mlp"]
    entry: dict[str, Any] = {"skip": rng.sample(kinds, rng.randrange(4)) if rng.random() < 0.7 else hostile(rng)}
    if rng.random() < 0.4:
        entry[rng.choice(_CONFIG_WORDS)] = hostile(rng)
    table = config.setdefault("per_layer_config", {})
    if isinstance(table, dict):
        key = rng.choice(_LAYER_KEYS)
        table[Twin(key) if rng.random() < 0.1 else key] = entry


def _set_rope(rng: Random, config: dict[str, Any]) -> None:
    kind = rng.choice(_ROPES)
    rope: dict[str, Any] = {rng.choice(("rope_type", "type")): kind, "factor": rng.choice((1.0, 2.0, 8, 0.5))}
    if rng.random() < 0.1:
        rope[rng.choice(("rope_type", "type"))] = rng.choice(_ROPES)
    if kind == "llama3" or rng.random() < 0.2:
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    if rng.random() < 0.6:
        rope[rng.choice(_CONFIG_WORDS)] = hostile(rng)
    config[rng.choice(("rope_scaling", "rope_parameters"))] = rope


def _set_sizes_by_layer(rng: Random, config: dict[str, Any]) -> None:
    """A list of sizes in place of one, as some pruning methods write it."""
    count = config.get("num_hidden_layers")
    length = count if isinstance(count, int) and 0 < count < 9 and rng.random() < 0.8 else rng.randrange(4)
    key = rng.choice([key for key in _CONFIG_WORDS if key.startswith(("num_", "intermediate", "layer_", "head_"))])
    config[key] = [rng.choice((0, 1, 2, 6, 6, 8)) if rng.random() < 0.9 else hostile(rng) for _ in range(length)]


def _set_blocks(rng: Random, config: dict[str, Any]) -> None:
    """A block more, less or of another form."""
    blocks = config.setdefault("block_configs", [])
    if isinstance(blocks, list):
        off = {"no_op": rng.random() < 0.5, "replace_with_linear": rng.random() < 0.3}
        attention = {**off, rng.choice(_CONFIG_WORDS): hostile(rng)} if rng.random() < 0.5 else off
        ffn = {"intermediate_size": rng.choice((6, 1, None)), rng.choice(("ffn_mult", "no_op", "x")): hostile(rng)}
        typed = {"subblock_configs": [{"kind": "attention", **attention}, {"kind": "ffn", **ffn}]}
        blocks.append(rng.choice(({"attention": attention, "ffn": ffn}, typed, {"attention": attention, **typed})))
        del blocks[: rng.randrange(2)]


def _set_type(rng: Random, config: dict[str, Any]) -> None:
    types = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gpt_neox",
        "phi3",
        "mixtral",
        "t5",
        "LLAMA",
        "nemotron-nas",
    )
    config["model_type"] = rng.choice((*types, hostile(rng)))


def _set_sizes(rng: Random, config: dict[str, Any]) -> None:
    key = rng.choice([key for _, key in slots(config) if isinstance(key, str)] or ["hidden_size"])
    config[key] = rng.choice((0, 1, 2, 3, 4, 8, 16, 1024, 1 << 20))


_CONFIG_EDITS: Final[tuple[Callable[[Random, dict[str, Any]], None], ...]] = (
    _set_key, _set_lists, _set_overrides, _set_rope, _set_type, _set_sizes, _set_sizes_by_layer, _set_blocks,
)  # fmt: skip


def _make_plan(rng: Random, _seed: Seed) -> Case:
    # in a box, so that the whole plan is a value too
    box = {"plan": json.loads(rng.choice(_PLANS))}
    for _ in range(num_edits(rng)):
        plan = box.get("plan")
        if rng.random() < 0.3 and isinstance(plan, dict) and "drop_attn_list" in plan:
            _set_lists(rng, plan)
        else:
            edit_anything(rng, box, _PLAN_WORDS)
    text = to_text(next(iter(box.values()), None), rng.random() < 0.8)
    # the YAML library needs seconds for long texts
    if (rng.random() < 0.1 or b"slices" in text) and len(text) < 2000:
        text = _as_yaml(rng, text)
    files = {PLAN: edit_bytes(rng, text) if rng.random() < 0.1 else text}
    if rng.random() < 0.2:
        files[MAPPING] = rng.choice((b'{"0": 0, "1": 1, "3": 2}', b"{}", b"[]", b'{"\\u202e": 1}', b"{"))
    return Case("drop-plan", files, "drop-plan")


def _as_yaml(rng: Random, text: bytes) -> bytes:
    """JSON is YAML behind a mark of its beginning; here and there something only YAML can say."""
    text = b"--- " + text
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(_YAML_TOKENS) + text[at:]
    return text


_MAKERS: Final[Mapping[str, Callable[[Random, Seed], Case]]] = {
    "header": make_header,
    "index": make_index,
    "config": _make_config,
    "drop-plan": _make_plan,
}
