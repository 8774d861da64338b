"""A model as one ONNX file: what ONNX Runtime answers is what PyTorch answers.

An export takes seconds; each family has one, and what a wrong file does is seen on
files that are written here node by node.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
)

import drone
from drone.model import onnx as exporter

MISSING = "needs onnx, onnxruntime and onnxscript: the extra `onnx` brings them"

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
DISTILBERT = DistilBertConfig(
    vocab_size=100,
    dim=32,
    n_layers=1,
    n_heads=4,
    hidden_dim=64,
    max_position_embeddings=40,
)
GPT2 = GPT2Config(
    vocab_size=100,
    n_embd=32,
    n_layer=1,
    n_head=4,
    n_positions=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES)),  # MiniLM is one
    "mpnet": (MPNetForSequenceClassification, MPNetConfig(**SIZES)),
    "distilbert": (DistilBertForSequenceClassification, DISTILBERT),
    "gpt2": (GPT2ForSequenceClassification, GPT2),
}


@pytest.fixture(scope="module")
def runtime() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=MISSING)
    return pytest.importorskip("onnxruntime", reason=MISSING)


def rows(count: int, length: int, **more: Tensor) -> dict[str, Tensor]:
    """Rows of other lengths than each other, so that there are pads."""
    ids = torch.randint(5, 100, (count, length))
    real = torch.arange(length) < torch.randint(2, length + 1, (count, 1))
    return {"input_ids": ids * real, "attention_mask": real.long(), **more}


def lively(family: str) -> PreTrainedModel:
    """Make a model whose attention is not uniform, and whose biases are not 0."""
    kind, config = FAMILIES[family]
    model = kind(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thin_model_answers_as_in_pytorch_whatever_the_rows(
    family: str, runtime: Any, tmp_path: Path
) -> None:
    model = lively(family)
    # Of an encoder the attention blocks too; a decoder's stay dense.
    names = (
        drone.encoder_linears(model)
        if family == "gpt2"
        else drone.costs.searchable(model)
    )
    small = drone.compress(model, dict.fromkeys(names, 5))
    path = tmp_path / "small.onnx"
    # As many rows as tokens: an exporter may take the two for one number.
    batch = rows(9, 9, labels=torch.zeros(9).long())
    assert drone.export_onnx(small, path, batch) < 1e-5
    session = runtime.InferenceSession(path)
    for batch in (rows(1, 3), rows(3, 30)):
        with torch.no_grad():
            expected = small(**batch).logits
            dense = model(**batch).logits
        (found,) = session.run(None, {name: t.numpy() for name, t in batch.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected)
        assert (dense - expected).abs().max() > 1e-3  # which of the two would be seen
    # Products stay thin: the file holds the factors, not what they multiply to.
    thin, thick = (sum(4 * p.numel() for p in m.parameters()) for m in (small, model))
    content = path.read_bytes()
    assert thin < len(content) < thin + 60_000 and thick > thin
    assert str(Path(drone.__file__).parent).encode() not in content  # no stack traces
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]


class Sum(nn.Module):
    """(batch, length) → (batch, 1): the sum of a row's ids; or each id as it is."""

    def __init__(self, each: bool = False) -> None:
        super().__init__()
        self.head, self.each = nn.Linear(1, 1), each

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = input_ids.float()
        return ids if self.each else (ids * attention_mask).sum(1, keepdim=True)


def written(times: float, rows: int | str = "batch", each: bool = False) -> Any:
    """Write `Sum`, or each id that is no pad, times a number, node by node."""
    from onnx import TensorProto, helper

    def value(name: str, *shape: int | str) -> Any:
        kind = TensorProto.FLOAT if name == "output" else TensorProto.INT64
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "times"], ["output" if each else "many"]),
    ]
    if not each:
        nodes.append(helper.make_node("ReduceSum", ["many", "axis"], ["output"]))
    graph = helper.make_graph(
        nodes,
        "sum",
        [value(n, rows, "length") for n in ("input_ids", "attention_mask")],
        [value("output", rows, "length" if each else 1)],
        [
            helper.make_tensor("times", TensorProto.FLOAT, [], [times]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


class Program:
    """What PyTorch's exporter returns, of a file written by hand."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def save(self, path: Path, external_data: bool) -> None:
        assert not external_data
        path.write_bytes(self.model.SerializeToString())


BATCH = {
    "input_ids": torch.tensor([[1, 1, 1, 7], [4, 4, 4, 4], [2, 2, 2, 2]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"times": 0.5}, r"differ by 8 in row 1, .* of a batch of 3; 0.0016 is"),
        ({"times": float("nan")}, "differ by nan in row 0"),
        ({"times": 1.0, "rows": 3}, r"fixed the size of input_ids: \[3, 'length'\]"),
        ({"times": 1.0, "each": True}, r"output is \(3, 4\) where PyTorch's is \(3, 1"),
    ],
    ids=["another", "nan", "fixed", "shape"],
)
def test_another_answer_is_refused_and_no_file_is_left(
    wrong: dict[str, Any],
    said: str,
    runtime: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "sum.onnx"
    program = Program(written(**wrong))
    monkeypatch.setattr(exporter, "_program", lambda *_: program)
    with pytest.raises(ValueError, match=said):
        drone.export_onnx(Sum(), path, BATCH)
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_are_compared_where_no_pad_is(
    runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(written(1.0, each=True))  # says 0 at the pad, and PyTorch 7
    monkeypatch.setattr(exporter, "_program", lambda *_: program)
    assert drone.export_onnx(Sum(each=True), tmp_path / "each.onnx", BATCH) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["each.onnx"]


def test_what_cannot_be_exported_is_named(
    runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"

    def cannot(*_: Any, **__: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("a loop over rows")

    monkeypatch.setattr(torch.onnx, "export", cannot)
    with pytest.raises(ValueError, match="cannot export this Sum: a loop over rows"):
        drone.export_onnx(Sum(), path, BATCH)
    with pytest.raises(ValueError, match="bfloat16; float32 is needed"):
        drone.export_onnx(Sum().bfloat16(), path, BATCH)
    pixels = BATCH | {"pixels": torch.ones(3, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"pixels is .*3, 3, 8, 8.*batch, length"):
        drone.export_onnx(Sum(), path, pixels)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        drone.export_onnx(Sum(), path, BATCH)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_missing_package_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"onnx .*the extra `onnx`"):
        drone.export_onnx(Sum(), tmp_path / "sum.onnx", BATCH)
    assert list(tmp_path.iterdir()) == []
