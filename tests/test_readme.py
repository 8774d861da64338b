"""Examples for one's own model, README's and the page's, run as they are written."""

import csv
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
)
from typer.testing import CliRunner

import drone
from drone.cli.app import app
from drone.model.adapters import encoder_layers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "book" / "compress.md").read_text(encoding="utf-8")
WORDS = ["good", "bad", "a", "the", "film", "book"]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `my-model` and `rows.csv`, tiny stand-ins."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    made = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32)
    made.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    draw = random.Random(0)
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for _ in range(80):
            words = draw.choices(WORDS, k=draw.randint(2, 9))
            table.writerow([" ".join(words), int("good" in words)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(language: str, word: str, text: str = README) -> str:
    """The block of README, or of another text, that has this word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    (found,) = [each for each in blocks if word in each]
    return str(found)


def test_the_example_for_ones_own_model_and_rows(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    exec(block("python", "my-model"), names)
    dense, again, small = (names[name] for name in ("model", "again", "small"))
    assert isinstance(again, PreTrainedModel) and isinstance(small, PreTrainedModel)
    saved = AutoModelForSequenceClassification.from_pretrained(there / "small").eval()
    batch = names["batches"][0]
    with torch.inference_mode():
        found, expected, before = (m(**batch).logits for m in (again, saved, dense))
    assert torch.equal(found, expected) and not torch.equal(found, before)
    said = capsys.readouterr().out
    assert "asked for a share of 0.5: 12 of 12 modules replaced" in said
    assert "RankPlan by drone: loss ≤ 1.1 × the dense loss" in said
    assert names["plan"].loss <= 1.1 * names["plan"].dense_loss
    exec(block("python", "accepted", PAGE), names)
    assert names["low"] <= names["points"] <= names["high"]
    assert names["accepted"] == (there / "accepted" / "config.json").is_file()
    assert f"{names['points']:+.1f} points" in capsys.readouterr().out
    exec(block("python", "keep_layers", PAGE), names)
    assert len(encoder_layers(names["half"])) == 1  # of two
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} \d", said, re.M) for name in names["models"])


def test_the_commands(there: Path) -> None:
    lines = block("bash", "drone compress").splitlines()
    assert len(lines) == 3
    for line in lines:
        name, *arguments = shlex.split(line)
        done = CliRunner().invoke(app, arguments)
        assert name == "drone" and done.exit_code == 0, done.output
    assert "Load it" in (there / "smaller" / "README.md").read_text(encoding="utf-8")


def test_the_lines_that_serve_it_without_pytorch(there: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra `onnx`")
    model = BertForSequenceClassification.from_pretrained(there / "my-model").eval()
    tokenizer = BertTokenizerFast.from_pretrained(there / "my-model")
    small = drone.compress(model, 0.5)
    drone.save(small, there / "smaller")
    tokenizer.save_pretrained(there / "smaller")
    _, *arguments = shlex.split(block("bash", "drone onnx", PAGE))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "logits: at most" in done.output, done.output
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(block("python", "onnxruntime", PAGE), names)
    encoded = {n: torch.from_numpy(array) for n, array in names["encoded"].items()}
    with torch.inference_mode():
        expected = small(**encoded).logits
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected)
    batch = dict(tokenizer(["a film"], return_tensors="pt"))
    names = {"drone": drone, "small": small, "batches": [batch]}
    with pytest.raises(FileExistsError):  # the command has written it
        exec(block("python", "export_onnx", PAGE), names)
