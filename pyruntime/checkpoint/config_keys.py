"""Keys of config.json that no family asks for: known to be harmless, switched off, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.fields import Fields, some
from pyruntime.errors import UsageError
from pyruntime.spec import ModelSpec

# of transformers' PreTrainedConfig in releases 4 and 5: bookkeeping, training, other tasks, shapes of results
_OF_ANY_MODEL: Final = (
    "architectures model_type torch_dtype dtype transformers_version name_or_path use_cache return_dict "
    "output_attentions output_hidden_states attn_implementation experts_implementation chunk_size_feed_forward "
    "tie_last_hidden_states torchscript use_bfloat16 tf_legacy_loss pruned_heads is_decoder finetuning_task "
    "task_specific_params problem_type id2label label2id num_labels tokenizer_class prefix "
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id cls_token_id decoder_start_token_id"
)
# of transformers' GenerationConfig: they choose tokens from the logits, where generation_config.json says so
_OF_GENERATION: Final = (
    "max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams "
    "use_mtp cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h typical_p "
    "epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size "
    "bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale "
    "watermarking_config num_return_sequences output_scores output_logits return_dict_in_generate "
    "encoder_no_repeat_ngram_size is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit "
    "assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile "
    "continuous_batching_config low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints "
    "force_words_ids prefill_chunk_size"
)
# stamps of programs that train and convert, and what only training drops
_OF_PROGRAMS: Final = (
    "unsloth_version unsloth_fixed axolotl_config trl_version mergekit_version transformers.js_config model_max_length "
    "tokenizer_model_max_length tokenizer_padding_side use_flash_attention_2 use_flash_attn resid_pdrop embd_pdrop "
    "attn_pdrop hidden_dropout residual_dropout embedding_dropout gradient_checkpointing"
)
_HARMLESS: Final = frozenset(" ".join((_OF_ANY_MODEL, _OF_GENERATION, _OF_PROGRAMS)).split())
# what transformers leaves behind; other names with an underscore are noted
_PRIVATE: Final = ("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_from_model_config")
# said once when present: they would run code of the checkpoint's author elsewhere, never here
_CODE_KEYS: Final = ("auto_map", "trust_remote_code", "_attn_implementation_internal")
_REFUSED: Final = {
    "quantization_config": "quantised weights are not supported; use the unquantised checkpoint",
}
# only families without skips and norms ask for these
_MERGED: Final = ("skipless", "merged")


def refuse_unsupported(fields: Fields) -> None:
    """Raise UsageError CONFIG for a key that says the weights are something that cannot be run."""
    for key, why in _REFUSED.items():
        if fields.raw(key):
            raise UsageError("CONFIG", f"config.json has {key}: {why}")


def notes_on_keys(fields: Fields, family: Family, spec: ModelSpec, ignore: Iterable[str] = ()) -> tuple[str, ...]:
    """Notes on keys that nobody asked for and that do nothing, those that the user says to `ignore` among them.

    Raises UsageError CONFIG for all other keys that were not asked for: they may well mean another model.
    """
    asked = frozenset(ignore)
    obeyed = sorted(asked & fields.used())
    if obeyed:
        raise UsageError("CONFIG", f"ignore_config_keys names {some(obeyed)}, which pyruntime obeys; leave them out")
    notes = [f"{key} is ignored: no code of a checkpoint is ever run" for key in _CODE_KEYS if fields.raw(key)]
    fields.ignore(_HARMLESS | family.harmless)
    unknown = {key: fields.raw(key) for key in fields.unused() if not key.startswith("_")}
    private = [key for key in fields.unused() if key.startswith("_") and key not in (*_PRIVATE, *_CODE_KEYS)]
    for key in _MERGED:
        if unknown.get(key):
            raise UsageError("CONFIG", f"config.json has {key}: {str(unknown[key])[:80]}; {_why_not(spec, family)}")
    off = [key for key, value in unknown.items() if value is False or value in ([], {})]
    wrong = [key for key in unknown if key not in asked and key not in off]
    if wrong:
        raise UsageError(
            "CONFIG",
            f"config.json has {len(wrong)} unknown key{'s' * (len(wrong) > 1)}: {some(wrong)}; only if they have no "
            "influence on the logits, name them in ignore_config_keys (--ignore-config-keys a,b)",
        )
    ignored, absent = sorted(asked & set(unknown)), sorted(asked - set(unknown))
    notes += [f"ignore_config_keys names {some(absent)}, which need no word or are not there"] if absent else []
    notes += [f"keys of config.json that are ignored as asked: {some(ignored)}"] if ignored else []
    notes += [f"keys of config.json that are switched off and not known: {some(off)}"] if off else []
    notes += [f"private keys of config.json that are ignored: {some(private)}"] if private else []
    return tuple(notes)


def _why_not(spec: ModelSpec, family: Family) -> str:
    """What stands between projections that some model has merged."""
    for layer in spec.layers:
        for kind in ("attention", "mlp"):
            sublayer = getattr(layer, kind)
            if sublayer is not None and (sublayer.residual or sublayer.pre is not None):
                norm = family.tensor_name(f"layers.{layer.index}.{kind}.pre.weight") if sublayer.pre else "no norm"
                skip = "a skip" if sublayer.residual else "no skip"
                return (
                    f"merging is exact only without skips and norms, and the {kind} of layer {layer.index} has {skip} "
                    f"and {norm}; a merged model has model_type skipless and a spec (docs/formats.md)"
                )
    return f"family {spec.family} does not know it; remove the key"
