"""`pyruntime chat`: a conversation in the terminal."""

from __future__ import annotations

import dataclasses

from pyruntime.cli import options as o
from pyruntime.errors import UsageError
from pyruntime.llm import LLM


def chat(
    model: o.Model,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "auto",
    max_model_len: o.MaxModelLen = None,
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
) -> None:
    """Talk to a model that has a chat template. /reset starts over; /exit or the end of input leaves."""
    llm = LLM(
        model,
        drop_attn=drop_attn,
        drop_mlp=drop_mlp,
        drop_block=drop_block,
        drop_plan=drop_plan,
        dtype=dtype,
        target=target,
        device=device,
        max_model_len=max_model_len,
        revision=revision,
        prefer=prefer,
        ignore_config_keys=o.config_keys(ignore_config_keys),
        check_weights=check_weights,
        max_num_seqs=1,
    )
    if not llm.get_tokenizer().has_chat_template:
        raise UsageError("CHAT", f"{model} has no chat template; use `pyruntime generate`, or a model made for chat")
    said = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    params = o.sampling_params(llm, **said)
    if max_tokens is None:
        # an answer may be as long as the context allows
        params = dataclasses.replace(params, max_tokens=None)
    messages: list[dict[str, str]] = []
    while (line := _read()) is not None:
        if line == "/reset":
            messages.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            ids = llm.get_tokenizer().apply_chat_template(messages)
            answer = ""
            for output in llm.stream(ids, params):
                text = output.outputs[0].text
                print(text[len(answer) :], end="", flush=True)
                answer = text
            print()
            messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    """One line of the user, or None at the end."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/exit" else line
