"""A folder read in a new process: without `import drone` it fails, with it it works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drone import LowRankEmbedding, LSTMConfig, compress, encoder_linears, load, save
from drone.lab.lstm_model import LSTMLanguageModel
from drone.model.own import UnreadLSTMConfig

# Each line on its own: what loads is listed, what raises is not. One process for all,
# as a new one costs seconds.
WAYS = {
    "auto": "T.AutoModelForSequenceClassification.from_pretrained('model')",
    "encoder alone": "T.AutoModel.from_pretrained('model')",
    "class itself": "T.BertForSequenceClassification.from_pretrained('model')",
    "base class": "T.BertModel.from_pretrained('model')",
    "another head": "T.AutoModelForTokenClassification.from_pretrained('model')",
    "head for words": "T.AutoModelForMaskedLM.from_pretrained('model')",
    "device map": "T.AutoModel.from_pretrained('model', device_map='cpu')",
    "pipeline": "T.pipeline('text-classification', 'model')",
    "given config": "T.BertModel.from_pretrained('model', "
    "config=T.BertConfig.from_pretrained('model'))",
    "shards": "T.AutoModel.from_pretrained('shards')",
    "plainly saved": "T.AutoModel.from_pretrained('plain')",
    "checkpoint of a wrapped model": "T.AutoModel.from_pretrained('wrapped')",
    "state": "T.BertForSequenceClassification(T.BertConfig.from_pretrained('model'))"
    ".load_state_dict(load_file('model/model.safetensors'), strict=False)",
    "sentence transformer": "SentenceTransformer('model')",
}


def in_a_new_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def folders(tiny_bert: PreTrainedModel, tmp_path: Path) -> Path:
    """One compressed model, saved in each way there is."""
    small = compress(tiny_bert, dict.fromkeys(encoder_linears(tiny_bert), 4))
    save(small, tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    small.save_pretrained(tmp_path / "plain")
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    wrapped = compress(nn.DataParallel(tiny_bert), {"module.classifier": 1})
    wrapped = compress(wrapped, {"module.bert.encoder.layer.0.output.dense": 3})
    wrapped.module.save_pretrained(tmp_path / "wrapped")
    return tmp_path


TRY = """
import json, sys
{first}
import transformers as T
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
loaded = []
for name, way in {ways}.items():
    try:
        eval(way)
        loaded.append(name)
    except Exception as error:
        print(name, type(error).__name__, error, file=sys.stderr)
print(json.dumps(loaded))
"""


def test_without_drone_every_way_to_read_it_raises(folders: Path) -> None:
    done = in_a_new_process(folders, TRY.format(first="", ways=WAYS))
    assert json.loads(done.stdout.splitlines()[-1]) == []
    # and a program that does not catch it stops, with the reason
    done = in_a_new_process(
        folders, f"import transformers as T\n{WAYS['auto']}\nprint('went on')"
    )
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "MISMATCH" in done.stderr and "got drone" in done.stderr


def test_with_drone_every_way_to_read_it_works(folders: Path) -> None:
    ways = {k: v for k, v in WAYS.items() if k != "state"}
    done = in_a_new_process(folders, TRY.format(first="import drone", ways=ways))
    assert json.loads(done.stdout.splitlines()[-1]) == list(ways), done.stderr


def test_mismatched_sizes_ignored_is_the_one_way_that_stays(folders: Path) -> None:
    """Said in the documentation of `save`; the log still names each random layer."""
    way = WAYS["auto"].replace("')", "', ignore_mismatched_sizes=True)")
    done = in_a_new_process(folders, f"import transformers as T\n{way}")
    assert done.returncode == 0
    assert "Reinit due to size mismatch" in done.stderr
    assert "ignore_mismatched_sizes=True" in (save.__doc__ or "")


@pytest.mark.parametrize(
    "read",
    ["drone.load('model')", "AutoModelForCausalLM.from_pretrained('model')"],
    ids=["load", "auto"],
)
def test_an_lstm_folder_is_read_after_import_drone_alone(
    tmp_path: Path, read: str
) -> None:
    config = LSTMConfig(vocab_size=30, hidden_size=16, num_layers=2)
    model = LSTMLanguageModel(config).eval()
    small = compress(model, {"stack.0.recurrent": 3, "stack.1.input": 4})
    table = LowRankEmbedding.from_embedding(small.embedding, 5)
    small.set_submodule("embedding", table)
    save(small, tmp_path / "model")
    ids = torch.arange(12)[None]
    save_file({"ids": ids}, tmp_path / "ids")
    code = """
import sys, drone, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert "drone.lab" not in sys.modules
model = READ
with torch.inference_mode():
    save_file({"logits": model(load_file("ids")["ids"]).logits}, "logits")
""".replace("READ", read)
    done = in_a_new_process(tmp_path, code)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = small(ids).logits
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


def test_what_the_lab_needs_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LSTMLanguageModel(LSTMConfig(vocab_size=30, hidden_size=16))
    save(compress(model, {"stack.0.recurrent": 3}), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "drone.lab.lstm_model", None)
    # As after `import drone` alone: the lab's own registration has not happened yet.
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "drone-lstm", UnreadLSTMConfig)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ImportError, match=r"drone-lstm needs .*; the extra `lab`"):
            read(tmp_path / "model")


def test_a_folder_with_code_asks_nothing_runs_nothing_and_uses_no_network(
    tmp_path: Path,
) -> None:
    small = compress(BertForSequenceClassification(BertConfig(**SIZES)), RANKS)
    save(small, tmp_path / "known")
    save(small, tmp_path / "unknown")
    for name in ("known", "unknown"):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModel": "evil.Model",
            "AutoModelForSequenceClassification": "evil.Model",
        }
        del config["quantization_config"]["sha256"]
        if name == "unknown":
            config["model_type"] = "evil"
        path.write_text(json.dumps(config))
        (tmp_path / name / "evil.py").write_text("print('CODE RUNS')")
        (tmp_path / name / "custom_generate").mkdir()
        (tmp_path / name / "custom_generate/generate.py").write_text(
            "print('CODE RUNS')"
        )
    code = """
import socket
def refused(*_, **__): raise SystemExit("NETWORK")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
import drone, transformers as T
print(type(drone.load("known")).__name__)
try:
    drone.load("unknown")
except ValueError as error:
    print(error)
"""
    done = in_a_new_process(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BertForSequenceClassification\nunknown: config.json")
    assert "never run" in done.stdout
    assert "CODE RUNS" not in done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RANKS = {"bert.encoder.layer.0.intermediate.dense": 4}
