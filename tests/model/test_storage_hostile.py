"""Damaged and forged folders: each is read right or refused with one clear sentence."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from drone import compress, load, save

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
WIDE = "bert.encoder.layer.0.intermediate.dense"
BLOCK = "bert.encoder.layer.1.attention.self"
Json = dict[str, Any]
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, which copy it."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    small = compress(model, {WIDE: 4, BLOCK: 3})
    folder = tmp_path_factory.mktemp("hostile") / "sound"
    save(small, folder)
    small.save_pretrained(folder.parent / "shards", max_shard_size="4KB")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def config(change: Callable[[Json], object], sealed: bool = False) -> Change:
    """Change config.json; unless sealed, take the digests out, as a forger would."""

    def changed(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        if not sealed:
            del content["quantization_config"]["sha256"]
        change(content)
        path.write_text(json.dumps(content))

    return changed


def ours(**fields: object) -> Change:
    """Change the part of config.json that drone wrote."""
    return config(lambda c: c["quantization_config"].update(fields))


def top(**fields: object) -> Change:
    return config(lambda c: c.update(fields))


def weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change tensors, and take the digests out."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config(lambda c: None)(folder)

    return changed


def one(key: str, made: Callable[[Tensor], Tensor]) -> Change:
    return weights(lambda w: w.update({key: made(w[key]).contiguous()}))


def flip(at: int) -> Change:
    """Turn over one bit of the weights' file; the digests stay."""

    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[at] ^= 0x40
        path.write_bytes(bytes(content))

    return changed


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def moved_outside(absolute: bool) -> Change:
    """Name a shard that lies in another folder."""

    def changed(folder: Path) -> None:
        other = folder.parent / "other"
        other.mkdir()
        (folder / "model.safetensors").rename(other / "model.safetensors")
        keys = load_file(other / "model.safetensors")
        name = "../other/model.safetensors"
        name = str(other / "model.safetensors") if absolute else name
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        text("model.safetensors.index.json", json.dumps(index))(folder)
        config(lambda c: None)(folder)

    return changed


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def index(content: object) -> Change:
    def changed(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        text("model.safetensors.index.json", json.dumps(content))(folder)

    return changed


LEFT, RIGHT = f"{WIDE}.left", f"{WIDE}.right"
QUERY = f"{BLOCK}.query.weight"
DENSE = "bert.encoder.layer.0.output.dense.weight"

REFUSED: dict[str, tuple[Change, str]] = {
    # damage, found by the digests
    "bit of a weight": (flip(-2), r"model\.safetensors: its SHA-256 is not the one"),
    "bit in the middle": (flip(5000), "its SHA-256"),
    "other activation": (
        config(lambda c: c.update(hidden_act="relu"), sealed=True),
        r"config\.json: its SHA-256 \(beside labels\) is not the one",
    ),
    "other layer norm": (
        config(lambda c: c.update(layer_norm_eps=1.0), sealed=True),
        "its SHA-256",
    ),
    "digest of another file": (ours(sha256={"x.safetensors": "0"}), "has no SHA-256"),
    "digests a list": (ours(sha256=["0"]), r"sha256 is \['0'\]; texts"),
    "weights cut off": (
        lambda f: os.truncate(f / "model.safetensors", 900),
        "model.safetensors: damaged",
    ),
    "weights empty": (text("model.safetensors", ""), "damaged, or not safetensors"),
    "weights are text": (text("model.safetensors", "{}" * 99), "damaged, or not safe"),
    "config cut off": (text("config.json", '{"a": '), r"config\.json: damaged, or no"),
    "config a list": (text("config.json", "[1]"), "holds a list; an object"),
    "config too deep": (text("config.json", "[" * 99999), "damaged, or no JSON"),
    # numbers that are none
    "NaN factor": (one(LEFT, lambda w: w * float("nan")), f"{LEFT} has NaN or Inf"),
    "one Inf": (one(RIGHT, lambda w: w.fill_(float("inf"))), f"{RIGHT} has NaN or Inf"),
    "NaN in a dense weight": (one(DENSE, lambda w: w * float("nan")), "has NaN or Inf"),
    "int64 factor": (one(LEFT, Tensor.long), f"{LEFT} is I64; torch.float32 is"),
    "int64 dense weight": (one(DENSE, Tensor.long), f"{DENSE} is I64"),
    "bool factor": (one(LEFT, Tensor.bool), f"{LEFT} is BOOL"),
    "complex factor": (one(LEFT, lambda w: w.to(torch.complex64)), f"{LEFT} is C64"),
    "8-bit factor": (one(LEFT, lambda w: w.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    # shapes
    "factor turned": (one(LEFT, lambda w: w.T), r"shape \(4, 32\); \(32, 4\) is what"),
    "factor flat": (one(LEFT, lambda w: w.flatten()), r"has shape \(128,\)"),
    "query too thin": (one(QUERY, lambda w: w[:-1]), rf"{QUERY} has shape \(5, 16\)"),
    "dense too small": (one(DENSE, lambda w: w[1:]), f"{DENSE} has shape"),
    "factor missing": (weights(lambda w: w.pop(LEFT)), f"missing tensor {LEFT}"),
    "bias missing": (weights(lambda w: w.pop(f"{WIDE}.bias")), "missing tensor"),
    "dense missing": (weights(lambda w: w.pop(DENSE)), f"missing keys: {DENSE}"),
    "one too many": (
        weights(lambda w: w.update({"bert.x": torch.ones(2)})),
        "unexpected keys: bert.x",
    ),
    "a dense layer for a thin one": (
        weights(lambda w: w.update({f"{WIDE}.weight": w[LEFT] @ w[RIGHT]})),
        "a rank .* and a dense weight",
    ),
    # bombs
    "billion words": (top(vocab_size=10**9), r"\(1000000000, 16\) is what"),
    "wide": (top(intermediate_size=10**8), r"has shape \(32"),
    "long": (top(max_position_embeddings=10**9), r"has shape \(40, 16\)"),
    "million layers": (top(num_hidden_layers=10**6), "num_hidden_layers is 1000000; "),
    "billion labels": (top(num_labels=10**9), "num_labels is 1000000000; "),
    "nested layers": (
        top(text_config={"num_hidden_layers": 10**7}),
        "num_hidden_layers is 10000000",
    ),
    # ranks and names
    "rank 0": (ours(ranks={WIDE: 0}), f"rank of {WIDE} is 0; a whole number"),
    "rank -3": (ours(ranks={WIDE: -3}), f"rank of {WIDE} is -3"),
    "rank text": (ours(ranks={WIDE: "4"}), f"rank of {WIDE} is '4'"),
    "rank float": (ours(ranks={WIDE: 4.0}), f"rank of {WIDE} is 4.0"),
    "rank true": (ours(ranks={WIDE: True}), f"rank of {WIDE} is True"),
    "rank null": (ours(ranks={WIDE: None}), f"rank of {WIDE} is None"),
    "rank above": (ours(ranks={WIDE: 17}), f"{WIDE}: the rank is 17; allowed .* 16"),
    "rank enormous": (ours(ranks={WIDE: 10**12}), f"{WIDE}: the rank is 10"),
    "heads above": (ours(ranks={BLOCK: 9}), f"{BLOCK}: the rank is 9; allowed .* 8"),
    "rank smaller": (ours(ranks={WIDE: 3, BLOCK: 3}), r"\(3, 16\) is what config"),
    "ranks of an LSTM": (ours(ranks={WIDE: {"weight_ih_l0": 3}}), "is a Linear and ha"),
    "ranks a list": (ours(ranks=[1]), r"ranks are \[1\]; \{module: rank\}"),
    "ranks null": (ours(ranks=None), "ranks are None"),
    "no ranks": (ours(ranks={}), r"ranks are \{\}"),
    "ranks left out": (
        config(lambda c: c["quantization_config"].pop("ranks")),
        "ranks are None",
    ),
    "misspelt": (
        ours(ranks={WIDE: 4, BLOCK: 3, "bert.encoder.layer.0.outptu.dense": 3}),
        r"no module .*outptu\.dense",
    ),
    "a layer norm": (
        ours(ranks={"bert.encoder.layer.0.output.LayerNorm": 3}),
        "LayerNorm",
    ),
    "a list of layers": (ours(ranks={"bert.encoder.layer": 3}), "a ModuleList"),
    "rank left out": (ours(ranks={WIDE: 4}), rf"{BLOCK}.*shape \(6"),
    "version 3": (ours(format_version=3), "format 3; this version of drone reads"),
    "version text": (ours(format_version="1"), "format '1'; this"),
    "version null": (ours(format_version=None), "format None; this"),
    "ties a list": (ours(ties=[1]), r"ties is \[1\]; texts"),
    "another method": (ours(quant_method="gptq"), "names no ranks"),
    "method null": (ours(quant_method=None), "names no ranks"),
    "quantization a list": (top(quantization_config=[1]), "names no ranks"),
    # architectures
    "no class": (top(architectures=[]), r"architectures are \[\]; a list with one"),
    "class null": (top(architectures=None), "architectures are None"),
    "class a text": (top(architectures="BertModel"), "architectures are 'BertModel'"),
    "two classes": (top(architectures=["BertModel", "X"]), "a list with one class"),
    "unknown class": (top(architectures=["NoSuchModel"]), "name NoSuchModel, which is"),
    "no model class": (top(architectures=["Trainer"]), "name Trainer, which is no mo"),
    "class of others": (top(architectures=["GPT2Model"]), "GPT2Model, .* for a bert"),
    "a function": (top(architectures=["pipeline"]), "name pipeline, which is no mo"),
    # Built, it would make transformers take every later class for one with experts.
    "the abstract one": (top(architectures=["PreTrainedModel"]), "which is no mo"),
    "abstract BERT": (top(architectures=["BertPreTrainedModel"]), "which is no mo"),
    # the rest of the config
    "another family": (top(model_type="gpt2"), "config.json"),
    "no family": (config(lambda c: c.pop("model_type")), r"give the class, load\(fol"),
    "family a number": (top(model_type=3), "config.json"),
    "no heads": (top(num_attention_heads=0), "config.json"),
    "heads that do not fit": (top(num_attention_heads=3), "config.json"),
    "negative width": (top(intermediate_size=-4), "config.json"),
    "width a text": (top(hidden_size="wide"), "config.json"),
    "no such activation": (top(hidden_act="evil"), "config.json"),
    # files elsewhere
    "shard above": (moved_outside(absolute=False), "lies outside"),
    "shard elsewhere": (moved_outside(absolute=True), "lies outside"),
    "other weights": (top(transformers_weights="../x.bin"), "is never followed"),
    "pickle": (pickled, "config.json and model.safetensors are needed"),
    "index without map": (index({}), "has no weight_map"),
    "index a list": (index([1]), "holds a list"),
    "index of a pickle": (index({"weight_map": {"a": "x.bin"}}), "is no safetensors"),
    "index of a number": (index({"weight_map": {"a": 3}}), "3 is no safetensors"),
    "shard not there": (
        index({"weight_map": {"a": "x.safetensors"}}),
        "the index names it",
    ),
    "adapter": (text("adapter_config.json", "{}"), "has an adapter; merge it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_folder_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    change, message = REFUSED[name]
    change(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kilobytes: refused before memory is taken
    assert len(str(error.value)) < 700
    assert "Traceback" not in str(error.value)


PLAIN = [
    "bit of a weight",
    "other activation",
    "weights cut off",
    "NaN factor",
    "int64 factor",
    "factor turned",
    "factor missing",
    "rank 0",
    "rank text",
    "rank above",
    "misspelt",
    "rank left out",
    "version 3",
    "shard above",
    "shard elsewhere",
    "a dense layer for a thin one",
]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_from_pretrained_refuses_it_too(folder: Path, name: str) -> None:
    change, _ = REFUSED[name]
    change(folder)
    with pytest.raises(Exception, match=r"(?s).") as error:
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert not isinstance(error.value, AttributeError | KeyError | NameError)


def relabelled(content: Json) -> None:
    content |= {"id2label": {"0": "bad", "1": "good"}, "transformers_version": "9"}


def renamed_back(tensors: dict[str, Tensor]) -> None:
    """LayerNorm's parameters as transformers 2 called them."""
    for key in list(tensors):
        if "LayerNorm" in key:
            old = key.replace("weight", "gamma").replace("bias", "beta")
            tensors[old] = tensors.pop(key)


def first_format(folder: Path) -> None:
    """What drone wrote before there were markers and digests."""
    weights(lambda w: w.pop(f"{WIDE}.weight"))(folder)
    ours_now = json.loads((folder / "config.json").read_text())
    ours_now["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(ours_now))


def link(folder: Path) -> None:
    """As a hub's cache keeps them."""
    blob = folder.parent / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)


RIGHT_ONES: dict[str, Change] = {
    "as it is": lambda f: None,
    "other labels": config(relabelled, sealed=True),
    "no digests": config(lambda c: None),
    "old names": weights(renamed_back),
    "first format": first_format,
    "behind a link": link,
    "more files": text("README.md", "# A model"),
    "a stray pickle": text("pytorch_model.bin", "evil"),
    "a stray model file": text("other.safetensors", "evil"),
    "auto_map": top(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.M"}),
    "more fields": ours(future="field"),
    "shards": lambda f: (
        shutil.rmtree(f),
        shutil.copytree(SHARDS["folder"], f),
    ),
}
SHARDS: dict[str, Path] = {}


def test_an_abstract_class_is_never_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cls is PreTrainedModel, which has no"):
        load(tmp_path, cls=PreTrainedModel)
    made = "_can_set_experts_implementation_cached_value"
    assert made not in vars(PreTrainedModel)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(9)[None]).logits


@pytest.mark.parametrize("name", RIGHT_ONES)
def test_what_may_differ_is_read_right(folder: Path, sound: Path, name: str) -> None:
    SHARDS["folder"] = sound.parent / "shards"
    expected = load(sound).state_dict()
    RIGHT_ONES[name](folder)
    for found in (
        load(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    ):
        state = found.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_path_that_leads_up_is_no_reason_to_refuse(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "here").mkdir()
    monkeypatch.chdir(folder.parent / "here")
    load("../model")
    AutoModelForSequenceClassification.from_pretrained("../model/")
