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
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drone import LowRankEmbedding, LSTMConfig, compress, encoder_linears, load, save
from drone.lab.lstm_model import LSTMLanguageModel
from drone.model.own import UnreadLSTMConfig

# Each line on its own: what loads is listed, what raises is not. A new process costs
# ten seconds: one tries all of them, and three serve all tests of this file.
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

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RANKS = {"bert.encoder.layer.0.intermediate.dense": 4}
MARK = "\n--- next ---\n"

TRY = f"""
loaded = []
for name, way in ways.items():
    try:
        eval(way)
        loaded.append(name)
    except Exception as error:
        print(name, type(error).__name__, error, file=sys.stderr)
print(json.dumps(loaded))
print({MARK!r}, file=sys.stderr)
"""

IMPORTS = """
import json, sys
import transformers as T
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
"""


def in_a_new_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT, saved in each way there is, and an LSTM with its logits."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    small = compress(bert, dict.fromkeys(encoder_linears(bert), 4))
    save(small, folder / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    small.save_pretrained(folder / "plain")
    small.save_pretrained(folder / "shards", max_shard_size="20KB")
    wrapped = compress(nn.DataParallel(bert), {"module.classifier": 1})
    wrapped = compress(wrapped, {"module.bert.encoder.layer.0.output.dense": 3})
    wrapped.module.save_pretrained(folder / "wrapped")
    save(compress(bert, RANKS), folder / "known")
    save(compress(bert, RANKS), folder / "unknown")
    for name in ("known", "unknown"):
        name_code_of_its_own(folder / name)
    lstm = LSTMLanguageModel(LSTMConfig(vocab_size=30, hidden_size=16, num_layers=2))
    thin = compress(lstm.eval(), {"stack.0.recurrent": 3, "stack.1.input": 4})
    table = LowRankEmbedding.from_embedding(thin.embedding, 5)
    thin.set_submodule("embedding", table)
    save(thin, folder / "lstm")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        save_file({"ids": ids, "logits": thin(ids).logits}, folder / "expected")
    return folder


def name_code_of_its_own(folder: Path) -> None:
    """Have a folder's config name code in it; `unknown` is also of an unknown type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForSequenceClassification": "evil.Model",
    }
    del config["quantization_config"]["sha256"]
    if folder.name == "unknown":
        config["model_type"] = "evil"
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("print('CODE RUNS')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("print('CODE RUNS')")


# --- without drone ---------------------------------------------------------------


@pytest.fixture(scope="module")
def without(folder: Path) -> subprocess.CompletedProcess[str]:
    """Try each way; ignore the sizes; then fail and catch nothing."""
    ignored = WAYS["auto"].replace("')", "', ignore_mismatched_sizes=True)")
    code = f"""{IMPORTS}
ways = {WAYS!r}
{TRY}
{ignored}
print("sizes ignored")
print({MARK!r}, file=sys.stderr)
{WAYS["auto"]}
print("went on")
"""
    return in_a_new_process(folder, code)


def test_without_drone_every_way_to_read_it_raises(
    without: subprocess.CompletedProcess[str],
) -> None:
    assert json.loads(without.stdout.splitlines()[0]) == [], without.stderr
    # and a program that does not catch it stops, with the reason
    assert without.returncode != 0
    assert "went on" not in without.stdout
    reason = without.stderr.split(MARK)[-1]
    assert "MISMATCH" in reason and "got drone" in reason


def test_mismatched_sizes_ignored_is_the_one_way_that_stays(
    without: subprocess.CompletedProcess[str],
) -> None:
    """Said in the documentation of `save`; the log still names each random layer."""
    assert without.stdout.splitlines()[1:] == ["sizes ignored"]
    assert "Reinit due to size mismatch" in without.stderr.split(MARK)[1]
    assert "ignore_mismatched_sizes=True" in (save.__doc__ or "")


# --- with drone ------------------------------------------------------------------

LSTM = """
assert not any(name.startswith("drone.lab") for name in sys.modules)
model = READ
with torch.inference_mode():
    logits = model(load_file("expected")["ids"]).logits
save_file({"logits": logits}, "logits-WAY")
"""


@pytest.fixture(scope="module")
def with_drone(folder: Path) -> subprocess.CompletedProcess[str]:
    """Try each way; then read the LSTM, for the first time, by `load`."""
    ways = {k: v for k, v in WAYS.items() if k != "state"}
    lstm = LSTM.replace("READ", "drone.load('lstm')").replace("WAY", "load")
    code = f"import drone, torch\n{IMPORTS}\nways = {ways!r}\n{TRY}\n{lstm}"
    return in_a_new_process(folder, code)


@pytest.fixture(scope="module")
def offline(folder: Path) -> subprocess.CompletedProcess[str]:
    """With no network, read folders that name code; then the LSTM by transformers."""
    code = """
import socket
def refused(*_, **__): raise SystemExit("NETWORK")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
import sys, drone, torch, transformers as T
from safetensors.torch import load_file, save_file
print(type(drone.load("known")).__name__)
try:
    drone.load("unknown")
except ValueError as error:
    print(error)
"""
    auto = "T.AutoModelForCausalLM.from_pretrained('lstm')"
    lstm = LSTM.replace("READ", auto).replace("WAY", "auto")
    return in_a_new_process(folder, code + lstm)


def test_with_drone_every_way_to_read_it_works(
    with_drone: subprocess.CompletedProcess[str],
) -> None:
    wanted = [way for way in WAYS if way != "state"]
    assert json.loads(with_drone.stdout.splitlines()[0]) == wanted, with_drone.stderr


@pytest.mark.parametrize(
    ("way", "process"), [("load", "with_drone"), ("auto", "offline")]
)
def test_an_lstm_folder_is_read_after_import_drone_alone(
    folder: Path, request: pytest.FixtureRequest, way: str, process: str
) -> None:
    done = request.getfixturevalue(process)
    assert done.returncode == 0, done.stderr
    found = load_file(folder / f"logits-{way}")["logits"]
    assert torch.equal(found, load_file(folder / "expected")["logits"])


def test_a_folder_with_code_asks_nothing_runs_nothing_and_uses_no_network(
    offline: subprocess.CompletedProcess[str],
) -> None:
    assert offline.returncode == 0, offline.stderr
    said = offline.stdout + offline.stderr
    assert offline.stdout.startswith(
        "BertForSequenceClassification\nunknown: config.json"
    )
    assert "never run" in offline.stdout
    assert "CODE RUNS" not in said
    assert "[y/N]" not in said


# --- in this process -------------------------------------------------------------


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
