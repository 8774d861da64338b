"""A compressed model on disk: bit-equal, read by transformers, refused if damaged."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from drone import LowRankLinear, attention_blocks, compress, encoder_linears, load, save
from drone.model.storage import low_rank_modules

Weights = dict[str, Tensor]


def ranks_for(model: nn.Module) -> dict[str, int]:
    """The first layer's block, and two Linears: one in the block, one outside."""
    block = next(iter(attention_blocks(model)))
    linears = list(encoder_linears(model))
    return {block: 3, linears[2]: 7, linears[-1]: 5}


@pytest.fixture
def small(family: PreTrainedModel) -> PreTrainedModel:
    return compress(family, ranks_for(family))


@pytest.fixture
def small_bert(tiny_bert: PreTrainedModel) -> PreTrainedModel:
    return compress(tiny_bert, ranks_for(tiny_bert))


@pytest.fixture
def folder(small_bert: PreTrainedModel, tmp_path: Path) -> Path:
    """A whole folder, for a test to damage."""
    save(small_bert, tmp_path / "model")
    return tmp_path / "model"


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**batch).logits


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    replaced = [low_rank_modules(model) for model in (found, expected)]
    assert [{n: type(m) for n, m in r.items()} for r in replaced] == [
        {n: type(m) for n, m in replaced[1].items()}
    ] * 2


# --- there and back --------------------------------------------------------------


def test_a_saved_model_comes_back_bit_equal_and_silently(
    small: PreTrainedModel,
    padded_batch: dict[str, Tensor],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save(small.train(), tmp_path / "model")
    found = load(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert type(found) is type(small)
    assert not any(module.training for module in found.modules())
    assert_same_weights(found, small)
    expected = logits(small.eval(), padded_batch)
    assert torch.equal(logits(found, padded_batch), expected)


def test_a_module_replaced_by_hand_is_remembered_too(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    dense = tiny_bert.bert.pooler.dense
    tiny_bert.set_submodule("bert.pooler.dense", LowRankLinear.from_linear(dense, 4))
    save(tiny_bert, tmp_path / "model")
    assert_same_weights(load(tmp_path / "model"), tiny_bert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(
    small: PreTrainedModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    save(small.to(dtype), tmp_path / "model")
    found = load(str(tmp_path / "model"))
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert_same_weights(found, small)


def test_the_folder_is_an_ordinary_one_whose_config_has_the_ranks(
    family: PreTrainedModel, small: PreTrainedModel, tmp_path: Path
) -> None:
    save(small, tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    described = config["quantization_config"]
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    sums = described.pop("sha256")
    assert sums["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert described == {
        "quant_method": "drone",
        "format_version": 2,
        "ranks": ranks_for(family),
    }
    assert config["architectures"] == [type(family).__name__]
    assert set(load_file(tmp_path / "model/model.safetensors")) == set(
        small.state_dict()
    )


def test_transformers_reads_it_in_another_process(
    request: pytest.FixtureRequest, padded_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = {}
    for name in ("tiny_bert", "tiny_roberta", "tiny_mpnet", "tiny_distilbert"):
        dense = request.getfixturevalue(name)
        small = compress(dense, ranks_for(dense))
        save(small, tmp_path / name)
        expected[name] = logits(small, padded_batch)
    save_file(padded_batch, tmp_path / "batch")
    script = f"""
import drone, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
batch = load_file("batch")
with torch.inference_mode():
    save_file({{
        name: AutoModelForSequenceClassification.from_pretrained(name)(**batch).logits
        for name in {list(expected)}
    }}, "logits")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    found = load_file(tmp_path / "logits")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_encoder_is_read_alone_and_saved_on(
    family: PreTrainedModel,
    small: PreTrainedModel,
    padded_batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    save(small, tmp_path / "model")
    found = AutoModel.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        expected = small.base_model(**padded_batch).last_hidden_state
        assert torch.equal(found(**padded_batch).last_hidden_state, expected)
    found.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["quantization_config"]["ranks"] == ranks_for(family.base_model)
    assert_same_weights(load(tmp_path / "encoder"), found)


def test_an_encoder_becomes_a_classifier(
    family: PreTrainedModel, padded_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    encoder = compress(family.base_model, ranks_for(family.base_model))
    save(encoder, tmp_path / "encoder")
    assert_same_weights(load(tmp_path / "encoder"), encoder)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert type(found) is type(family)
    assert len(low_rank_modules(found)) == 3
    with torch.inference_mode():
        expected = encoder(**padded_batch).last_hidden_state
        again = found.base_model(**padded_batch).last_hidden_state
    assert torch.equal(again, expected)
    save(found, tmp_path / "classifier")
    assert_same_weights(load(tmp_path / "classifier"), found)


def test_plain_save_pretrained_loads_again_and_again(
    small: PreTrainedModel, tmp_path: Path
) -> None:
    small.save_pretrained(tmp_path / "one")
    first = load(tmp_path / "one")
    first.save_pretrained(tmp_path / "two")
    second = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
    save(second, tmp_path / "three")
    for model in (first, second, load(tmp_path / "three")):
        assert_same_weights(model, small)


def test_a_loaded_model_trains(
    small: PreTrainedModel, padded_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    save(small, tmp_path / "model")
    model = load(tmp_path / "model")
    # Nothing is left of the hook for quantized models: Trainer, .half() ask for it.
    assert not any(hasattr(model, a) for a in ("hf_quantizer", "quantization_method"))
    assert not model.is_quantized
    labels = torch.tensor([0, 1, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(**padded_batch, labels=labels).loss
    before.backward()
    for module in low_rank_modules(model).values():
        assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    assert model(**padded_batch, labels=labels).loss < before


def test_a_loaded_model_casts_and_compresses_further(
    small: PreTrainedModel, padded_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    save(small, tmp_path / "model")
    half = load(tmp_path / "model").half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in half.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    model = load(tmp_path / "model")
    block = next(iter(low_rank_modules(model)))
    thin_query = f"{block}.{small.get_submodule(block).projections[0]}"
    second_block, *_ = attention_blocks(model)
    smaller = compress(model, {thin_query: 4, second_block: 2})
    save(smaller, tmp_path / "smaller")
    found = load(tmp_path / "smaller")
    assert_same_weights(found, smaller)
    assert len(low_rank_modules(found)) == 5
    expected = logits(smaller, padded_batch)
    assert torch.equal(logits(found, padded_batch), expected)


# --- what is not saved -----------------------------------------------------------


def test_an_existing_folder_is_refused_and_left_as_it_was(
    folder: Path, small_bert: PreTrainedModel
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="model exists already"):
        save(small_bert, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_dense_model_and_a_plain_module_are_refused(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no module is low-rank"):
        save(tiny_bert, tmp_path / "model")
    plain = compress(nn.Sequential(nn.Linear(8, 8)), {"0": 2})
    with pytest.raises(TypeError, match="Sequential is no Hugging Face model"):
        save(plain, tmp_path / "model")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_two_modules_with_one_tensor_are_refused_and_named(
    small_bert: PreTrainedModel, tmp_path: Path
) -> None:
    one, two = small_bert.bert.encoder.layer
    view = one.output.dense.weight.detach()[:, :5]
    two.output.dense.left = nn.Parameter(view)
    with pytest.raises(ValueError, match=r"1\.output\.\S+ shares .*0\.output\.dense"):
        save(small_bert, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(
    small_bert: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, **_: object) -> None:
        (path / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(small_bert, "save_pretrained", half)
    with pytest.raises(OSError, match="disk full"):
        save(small_bert, tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []


# --- what is not loaded ----------------------------------------------------------

THIN = "bert.encoder.layer.1.output.dense.left"
DENSE = "bert.encoder.layer.0.output.dense.weight"


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    forget_digests(folder)


def forget_digests(folder: Path) -> None:
    """As a plain `save_pretrained` leaves it: what is looked at is the content."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(config))


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("read", [load, plain])
@pytest.mark.parametrize(
    "key",
    [
        THIN,
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.key.bias",
    ],
)
def test_a_missing_thin_tensor_is_named_by_both_ways_to_load(
    folder: Path, read: Callable[[Path], PreTrainedModel], key: str
) -> None:
    change_weights(folder, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match="missing tensor") as error:
        read(folder)
    assert key.removeprefix("bert.") in str(error.value)


@pytest.mark.parametrize("read", [load, plain])
def test_a_thin_tensor_of_another_shape_is_named_by_both_ways_to_load(
    folder: Path, read: Callable[[Path], PreTrainedModel]
) -> None:
    change_weights(folder, lambda w: w.update({THIN: w[THIN][:, 1:].contiguous()}))
    with pytest.raises(ValueError, match=r"has shape \(32, 4\); \(32, 5\)") as error:
        read(folder)
    assert THIN.removeprefix("bert.") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(DENSE), "missing keys: "),
        (
            lambda w: w.update({"bert.more": torch.ones(2)}),
            "unexpected keys: bert.more",
        ),
    ],
    ids=["missing", "extra"],
)
def test_a_dense_tensor_too_few_or_too_many_is_named(
    folder: Path, change: Callable[[Weights], object], message: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_encoder_of_which_half_a_pooler_is_missing_is_refused(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    save(compress(tiny_bert.bert, ranks_for(tiny_bert.bert)), tmp_path / "model")
    change_weights(tmp_path / "model", lambda w: w.pop("pooler.dense.bias"))
    with pytest.raises(ValueError, match=r"missing keys: pooler\.dense\.bias"):
        load(tmp_path / "model")


def test_a_dense_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({DENSE: torch.ones(2, 2)}))
    with pytest.raises(ValueError, match=DENSE):
        load(folder)


@pytest.mark.parametrize("read", [load, plain])
@pytest.mark.parametrize("left", [0, 4, 1000, -10])
def test_a_file_that_was_cut_off_is_called_damaged(
    folder: Path, read: Callable[[Path], PreTrainedModel], left: int
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    forget_digests(folder)
    with pytest.raises(Exception, match=r"(?i)damaged|header|incomplete") as error:
        read(folder)
    if read is load:
        assert isinstance(error.value, ValueError)
        assert str(path) in str(error.value)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("read", [load, plain])
def test_another_format_version_is_refused_by_both_ways_to_load(
    folder: Path, read: Callable[[Path], PreTrainedModel]
) -> None:
    change_config(folder, format_version=3)
    with pytest.raises(ValueError, match="format 3; this version of drone reads for"):
        read(folder)


@pytest.mark.parametrize("read", [load, plain])
def test_a_rank_for_a_module_that_is_not_there_is_named(
    folder: Path, read: Callable[[Path], PreTrainedModel]
) -> None:
    change_config(folder, ranks={"bert.encoder.layer.7.output.dense": 3})
    with pytest.raises(ValueError, match=r"layer\.7\.output\.dense"):
        read(folder)


def test_a_folder_without_its_files_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match="are needed"):
            load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_the_folder_of_a_dense_model_is_refused(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_bert.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense: its config\.json names no ranks"):
        load(tmp_path / "dense")
