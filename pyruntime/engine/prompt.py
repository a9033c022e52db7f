"""The forms a prompt may come in: text, token ids, or a mapping that says which; one or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list of prompts; a flat list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        # a generator, above all, must not lose its first prompts to a look at them
        raise UsageError(
            "PROMPT", f"prompts are {type(prompts).__name__}; expected text, a list of token ids, or a list of prompts"
        )
    # an empty list is no prompt at all: nothing to do
    if prompts and all(isinstance(each, int) for each in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def token_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, Sequence[int]]:
    """The text, if there is one, and the token ids of `prompt`. Raises UsageError PROMPT for anything else."""
    if isinstance(prompt, Mapping):
        known = {"prompt", "prompt_token_ids"}
        if not prompt or set(prompt) - known:
            raise UsageError(
                "PROMPT", f"a prompt mapping has the keys {sorted(map(str, prompt))}; expected {sorted(known)}"
            )
        if "prompt_token_ids" in prompt:
            text = prompt.get("prompt")
            if not isinstance(text, str | None):
                raise UsageError("PROMPT", f"prompt is {type(text).__name__}; expected text beside prompt_token_ids")
            return text, _ids(prompt["prompt_token_ids"])
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        return None, _ids(prompt)
    if tokenizer is None:
        raise UsageError("PROMPT", "text prompts need a tokenizer; pass token ids, or load without skip_tokenizer_init")
    if not prompt:
        raise UsageError("PROMPT", "the prompt is empty; expected some text")
    return prompt, tokenizer.encode(prompt)


def _ids(value: Any) -> Sequence[int]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise UsageError("PROMPT", f"a prompt is {type(value).__name__}; expected text or a list of token ids")
    return value
