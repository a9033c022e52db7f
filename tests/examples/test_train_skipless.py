"""Training without residual connections: it starts well conditioned, learns, goes on, and exports what it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyruntime.checkpoint import read_model
from pyruntime.spec import DropPlan
from tests.examples.training import command, script, write_text
from tests.helpers import all_logits, make_plan, relative_error

# layers without residual connections, at the sizes of a run of seconds
SKIPLESS: dict[str, Any] = {
    "skipless": True, "norm": "none", "layers": 4, "hidden": 96, "heads": 3, "kv_heads": 1, "ffn": 256, "vocab": 300,
    "context": 32, "batch": 2, "dropout": 0.0, "optimizer": "muon", "precision": "float32", "threads": 1,
    "warmup_steps": 2, "steps": 8, "eval_every": 4, "save_every": 4,
}  # fmt: skip


def random_ids(num_tokens: int, vocab: int) -> torch.Tensor:
    return torch.randint(vocab, (1, num_tokens), generator=torch.Generator().manual_seed(0))


def a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The script, the settings of a run and its data."""
    train, cfg = script(monkeypatch, "train"), script(monkeypatch, "train_model").Config(**{**SKIPLESS, **changes})
    write_text(tmp_path / "text.txt")
    _, data = script(monkeypatch, "train_text").encode((tmp_path / "text.txt").read_text(encoding="utf-8"), cfg, None)
    torch.manual_seed(0)
    return train, cfg, data


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_the_stream_starts_steady_and_square_maps_orthogonal(
    monkeypatch: pytest.MonkeyPatch, norm: str, kv_heads: int
) -> None:
    module = script(monkeypatch, "train_skipless")
    cfg = script(monkeypatch, "train_model").Config(**{**SKIPLESS, "kv_heads": kv_heads, "norm": norm})
    torch.manual_seed(0)
    model = module.Skipless(cfg)
    h = model.embedding(random_ids(32, 300))
    for layer in model.layers:
        h = layer(h, model.cos, model.sin)
        assert 0.4 < float(h.square().mean().detach()) < 1.6
        towards = torch.nn.functional.normalize(h.detach()[0], dim=-1)
        # tokens stay apart: the mean cosine of 32 unrelated ones, with themselves too, is 1 / 32
        assert float((towards @ towards.T).mean()) < 0.15
        for weight in (layer.attention.q.weight, layer.attention.o.weight):
            assert float(torch.linalg.cond(weight.detach().double())) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("kv_heads", "looks_back"), [(1, [2]), (2, [1, 3]), (4, [3])])
def test_heads_start_on_the_token_itself_or_on_the_one_before(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, looks_back: list[int]
) -> None:
    heads = 3 if kv_heads == 1 else 4
    settings = {**SKIPLESS, "hidden": 32 * heads, "heads": heads, "kv_heads": kv_heads}
    attention = script(monkeypatch, "train_skipless").Attention(script(monkeypatch, "train_model").Config(**settings))
    q = attention.q.bias.detach().double().view(heads, 2, 16)
    k = attention.k.bias.detach().double().view(kv_heads, 2, 16).repeat_interleave(heads // kv_heads, dim=0)
    # as complex numbers, which a position turns: the score at a distance is Re(q conj(k) e^(i w distance))
    product = torch.complex(q[:, 0], q[:, 1]) * torch.complex(k[:, 0], k[:, 1]).conj()
    angles = torch.outer(torch.arange(256.0).double(), 10000.0 ** (-torch.arange(16).double() / 16))
    scores = (product[:, None] * torch.polar(torch.ones_like(angles), angles)).real.sum(-1) / 32**0.5
    shares = scores.softmax(-1)  # [heads, distance]
    for head in range(heads):
        place = int(head in looks_back)
        assert int(shares[head].argmax()) == place
        assert float(shares[head, place]) > (0.5 if place else 0.9)


def test_a_run_learns_and_one_that_was_stopped_goes_on_as_if_it_was_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, cfg, data = a_run(
        monkeypatch, tmp_path, layers=2, hidden=32, heads=2, ffn=48, steps=24, eval_every=6, save_every=6
    )
    skipless = script(monkeypatch, "train_skipless").Skipless
    whole = skipless(cfg).train()
    curve = train.train(whole, data, tmp_path / "whole", False).curve
    assert [point["step"] for point in curve] == [6, 12, 18, 24]
    assert curve[-1]["train_loss"] < curve[0]["train_loss"] - 0.2

    batch = train.train_batch

    def stop(stream: torch.Tensor, step: int, cfg: Any) -> Any:
        if step == 15:
            raise KeyboardInterrupt
        return batch(stream, step, cfg)

    torch.manual_seed(0)
    stopped = skipless(cfg).train()
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(stopped, data, tmp_path / "stopped", False)
    torch.manual_seed(1)
    resumed = skipless(cfg).train()
    assert train.train(resumed, data, tmp_path / "stopped", True).step == 24
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("norm", "kv_heads", "optimizer"), [("none", 1, "muon"), ("none", 2, "adamw"), ("rms", 1, "muon")]
)
def test_the_export_runs_as_the_model_that_was_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, norm: str, kv_heads: int, optimizer: str
) -> None:
    write_text(tmp_path / "text.txt")
    options = ("--skipless", f"--norm={norm}", f"--kv-heads={kv_heads}", f"--optimizer={optimizer}", "--steps=6")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", command(tmp_path / "text.txt", out, *options)[1:])
    script(monkeypatch, "train").main()
    log = json.loads((out / "training_log.json").read_text())
    assert log["figures"]["steps"] == 6
    assert [set(each) for each in log["condition_numbers"]] == [{"q", "o"}] * 2
    assert not (out / "state").exists()

    trained = script(monkeypatch, "train_skipless").Skipless(script(monkeypatch, "train_model").Config(**log["config"]))
    trained.load_state_dict(load_file(out / "model.safetensors"))
    ids = random_ids(30, 300)
    with torch.no_grad():
        expected = trained.double().eval().logits(ids)[0]
    assert not any(part.residual for layer in read_model(out).spec.layers for _, part in layer.sublayers())
    (found,) = all_logits(make_plan(out, DropPlan()), [ids[0].tolist()], 7)
    assert relative_error(found, expected) < 1e-5


def test_a_norm_free_model_with_residual_connections_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="norm 'none' needs --skipless"):
        script(monkeypatch, "train_model").Config(norm="none")
