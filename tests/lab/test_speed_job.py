"""Clocks of random models: every setting a case, thin models as thin as they say."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from drone.lab import speed_job
from drone.layers.linear import LowRankLinear

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    bert = BertConfig(vocab_size=9000, **SMALL)
    llama = LlamaConfig(vocab_size=9000, num_key_value_heads=1, **SMALL)
    make = partial(BertModel, bert, add_pooling_layer=False)
    monkeypatch.setattr(speed_job, "bert_base", lambda: make().eval())
    monkeypatch.setattr(speed_job, "decoder", lambda: LlamaForCausalLM(llama).eval())
    monkeypatch.setattr(speed_job, "REPEATS", 2)


def test_thin_layers_have_the_share_asked_for_and_the_head_stays_dense() -> None:
    model = speed_job.thin(speed_job.decoder(), 0.5)
    assert isinstance(model.lm_head, torch.nn.Linear)
    thin = model.model.layers[0].mlp.up_proj
    assert isinstance(thin, LowRankLinear)
    assert thin.rank == 10  # break-even of 64 × 32 is 21; half of it


def test_all_cases_are_run_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cases", str(tmp_path), "--batches", "1", "--dtypes", "float32"]
    monkeypatch.setattr("sys.argv", ["speed_job", *arguments])
    speed_job.main()
    kept = sorted(path.parent.name for path in tmp_path.glob("*/*.json"))
    assert kept == ["speed-calibration", "speed-decoder", "speed-encoder"]
    first = capsys.readouterr().out
    assert "'dense': {'ms': " in first
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    speed_job.main()
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.json")}
