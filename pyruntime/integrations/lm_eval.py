"""pyruntime as a model of lm-eval (extra `lm-eval`): log-likelihoods from the plan, generation from the engine.

Checked with lm-eval 0.4.13. A task's YAML file may name Python functions, which lm-eval runs: take only task folders
that you trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pyruntime.engine.load import DropOptions, Loaded, load, make_engine
from pyruntime.engine.params import SamplingParams
from pyruntime.errors import RunError, UsageError
from pyruntime.evaluate import Window, continuations, pair_window

_MAX_GEN_TOKS: Final = 256
# what a task may say of generation; max_tokens and its like are spellings of max_gen_toks
_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("pyruntime")
class PyruntimeLM(LM):
    """A pruned model under lm-eval's interface: `simple_evaluate(model="pyruntime", model_args={"pretrained": ...})`.

    `pretrained` is a folder, a Hub id or a `Loaded`; `drop_attn`, `drop_mlp`, `drop_block` and `drop_plan` are those of
    LLM, `dtype`, `target`, `device` and `revision` too. `batch_size` and `max_batch_size` are taken and not needed:
    short texts share steps anyway.
    """

    def __init__(
        self,
        pretrained: str | Path | Loaded,
        *,
        drop_attn: Any = None,
        drop_mlp: Any = None,
        drop_block: Any = None,
        drop_plan: Any = None,
        dtype: str = "auto",
        target: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Loaded):
            drops = DropOptions(drop_attn=drop_attn, drop_mlp=drop_mlp, drop_block=drop_block, drop_plan=drop_plan)
            pretrained = load(
                pretrained, drops=drops, dtype=dtype, target=target, device=device or "auto", revision=revision
            )
        if pretrained.tokenizer is None:
            raise UsageError("LM_EVAL", "the model was loaded without its tokenizer; load it with")
        self._loaded = pretrained
        self._plan = pretrained.plan
        self._tokenizer = pretrained.tokenizer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (context, continuation); the rule is `pair_window`'s."""
        windows = [pair_window(self._plan, self._tokenizer, *request.args) for request in requests]
        with _bar("loglikelihood", windows, disable_tqdm) as bar:
            found = continuations(self._plan, windows, bar.update)
        return [(each.log_likelihood, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in the windows that lm-eval's own models take."""
        windows: list[Window] = []
        counts: list[int] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self._tokenizer.encode(request.args[0]),
                prefix_token=self._prefix_token_id(),
                max_seq_len=self._plan.max_position,
                context_len=1,
            )
            own = [Window([*context, *ids], len(context)) for context, ids in map(make_disjoint_window, rolling)]
            windows += own
            counts.append(len(own))
        with _bar("loglikelihood_rolling", windows, disable_tqdm) as bar:
            found = iter(continuations(self._plan, windows, bar.update) if windows else [])
        return [sum(next(found).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of "until", greedy unless the task samples.

        A context that leaves no room for the new tokens is cut off at the front. Raises UsageError LM_EVAL for settings
        that are not known.
        """
        engine = make_engine(self._loaded)
        for number, request in enumerate(requests):
            context, settings = request.args
            params = _params(settings, self._plan.max_position)
            ids = self._tokenizer.encode(context) or [self._prefix_token_id()]
            room = self._plan.max_position - (params.max_tokens or _MAX_GEN_TOKS)
            engine.add_request(str(number), ids[-room:], params)
        texts: dict[str, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or None) as bar:
            while engine.has_unfinished:
                for output in engine.step():
                    if output.finished:
                        (completion,) = output.outputs
                        if completion.finish_reason == "error":
                            raise RunError("NUMERICS", f"request {output.request_id}: {completion.stop_reason}")
                        texts[output.request_id] = completion.text
                        bar.update()
        return [texts[str(number)] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's own template writes it."""
        return self._tokenizer.render_chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps its caches of requests apart by."""
        return str(self._loaded.model.path).replace("/", "__")

    def _prefix_token_id(self) -> int:
        for token_id in (self._tokenizer.bos_id, self._tokenizer.eos_id):
            if token_id is not None:
                return token_id
        raise UsageError("LM_EVAL", "the tokenizer has neither an opening nor an end token to begin an empty text with")


def check_tasks(names: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """The tasks that lm-eval knows, `names` among them. Raises UsageError LM_EVAL for others; downloads nothing."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            "LM_EVAL", f"lm-eval has no task {', '.join(unknown)}; expected its names, a .jsonl file, or --include-path"
        )
    return manager


def run_tasks(
    loaded: Loaded,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """lm-eval's figures of each task: "acc,none", "acc_stderr,none" and so on.

    Raises as `check_tasks`, RunError IO for data that cannot be read or downloaded.
    """
    manager = check_tasks(names, include_path)
    try:
        found = simple_evaluate(
            model=PyruntimeLM(loaded),
            tasks=list(names),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:
        # what the Hub's libraries raise for a missing data set, and for a network that is down
        raise RunError(
            "IO",
            f"lm-eval cannot read the data of {', '.join(names)}: {error}; see to the network, or name a .jsonl file",
        ) from None
    assert found is not None
    return {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
        for name, figures in found["results"].items()
    }


def _params(settings: dict[str, Any], max_position: int) -> SamplingParams:
    said = dict(settings)
    lengths = [int(value) for name in _LENGTHS if (value := said.pop(name, None)) is not None]
    until = said.pop("until", None) or []
    sampled = said.pop("do_sample", None)
    values = {name: said.pop(name) for name in _SAMPLING if name in said}
    if said:
        raise UsageError("LM_EVAL", f"generation settings {sorted(said)} are not known; remove them from the task")
    if sampled is False or (sampled is None and "temperature" not in values):
        values["temperature"] = 0.0
    max_tokens = lengths[0] if lengths else _MAX_GEN_TOKS
    if max_tokens >= max_position:
        raise UsageError("LM_EVAL", f"{max_tokens} new tokens; the model holds {max_position}: lower max_gen_toks")
    stop = [until] if isinstance(until, str) else list(until)
    return SamplingParams(max_tokens=max_tokens, stop=[each for each in stop if each] or None, **values)


def _bar(what: str, windows: Sequence[Window], off: bool) -> Any:
    return tqdm(total=sum(len(window.token_ids) for window in windows), desc=what, unit="tok", disable=off or None)
