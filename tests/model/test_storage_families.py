"""Families, custom classes, LSTMs, shared modules and wrappers: there and back."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from drone import (
    LowRankEmbedding,
    LowRankLinear,
    LowRankLSTM,
    attention_blocks,
    compress,
    load,
    save,
)
from drone.model.ranks import low_rank_modules, rank_of, remember_ranks

Make = Callable[[], PreTrainedModel]
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
SPECIAL = {
    f"{name}_token_id": number
    for number, name in enumerate(["pad", "cls", "sep", "bos", "eos"])
}
FAMILIES: dict[str, Make] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**IMAGE)),
    "nomic": lambda: hf.NomicBertModel(hf.NomicBertConfig(**TEXT)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**TEXT, **SPECIAL)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1)
    ),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(text_config={**TEXT, "eos_token_id": 5}, vision_config=IMAGE)
    ),
}


# Fields that name a layer and are no depth have large values in these.
UNLIKE = {
    "qwen2 of one layer": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**TEXT | {"num_hidden_layers": 1}, num_key_value_heads=2)
    ),
    "gemma3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **TEXT,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=256,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0, 0.0],
            laurel_rank=8,
        )
    ),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_field_that_is_no_depth_is_not_taken_for_one(
    kind: str, tmp_path: Path
) -> None:
    model = UNLIKE[kind]().eval()
    (name, *_) = (n for n, _ in model.named_modules() if n.endswith("up_proj"))
    small = compress(model, {name: 4})
    save(small, tmp_path / "small")
    found = load(tmp_path / "small").state_dict()
    assert all(torch.equal(found[k], v) for k, v in small.state_dict().items())


def test_a_model_in_a_subfolder_is_read(tmp_path: Path) -> None:
    model = hf.BertModel(hf.BertConfig(**TEXT)).eval()
    small = compress(model, {"encoder.layer.0.output.dense": 4})
    save(small, tmp_path / "root" / "small")
    found = hf.BertModel.from_pretrained(tmp_path / "root", subfolder="small")
    state = found.state_dict()
    assert all(torch.equal(state[k], v) for k, v in small.state_dict().items())


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    ids, pixels = torch.arange(5, 13)[None], torch.ones(1, 3, 16, 16)
    if isinstance(model, hf.CLIPModel):
        return {"input_ids": ids, "pixel_values": pixels}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels}
    more = {"decoder_input_ids": ids} if isinstance(model, hf.T5Model) else {}
    if isinstance(model, hf.T5ForConditionalGeneration):
        more = {"decoder_input_ids": ids}
    return {"input_ids": ids, **more}


def output(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(**inputs(model))[0]


def thin(model: PreTrainedModel) -> PreTrainedModel:
    """All layers that are a product, at rank 4, the tied decoder among them."""
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    ranks = {n: min(4, *model.get_submodule(n).weight.shape) for n in names}
    return compress(model, ranks)


@pytest.mark.filterwarnings("ignore")  # of ranks above break-even, of broken ties
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_by_every_way(family: str, tmp_path: Path) -> None:
    small = thin(FAMILIES[family]().eval())
    expected = output(small)
    save(small, tmp_path / "saved")
    small.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    for found in (
        load(tmp_path / "saved"),
        load(tmp_path / "shards"),
        type(small).from_pretrained(tmp_path / "saved"),
    ):
        assert type(found) is type(small)
        assert torch.equal(output(found), expected)
        assert len(low_rank_modules(found)) == len(low_rank_modules(small))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["vit", "beit", "nomic"])
def test_names_of_older_transformers_are_read(family: str, tmp_path: Path) -> None:
    """As the first format was written: old names, no markers, no digests."""
    small = thin(FAMILIES[family]().eval())
    expected = output(small)
    del small._weight_conversions
    small._state_dict_hooks.clear()
    small.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    for found in (load(tmp_path / "old"), type(small).from_pretrained(path.parent)):
        assert torch.equal(output(found), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_read_out_of_an_encoder_decoder(tmp_path: Path) -> None:
    small = thin(FAMILIES["t5"]().eval())
    save(small, tmp_path / "both")
    found = hf.T5EncoderModel.from_pretrained(tmp_path / "both")
    ids = torch.arange(5, 13)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids)[0], small.encoder(ids)[0])


# --- classes of one's own ----------------------------------------------------------


class MineConfig(PreTrainedConfig):
    model_type = "mine"


class Mine(PreTrainedModel):
    """A table, an LSTM, one Linear under two names, a head: none is a BERT's."""

    config_class = MineConfig
    base_model_prefix = ""

    def __init__(self, config: MineConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(30, 16)
        self.rnn = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.one = nn.Linear(16, 16)
        self.two = self.one
        self.head = nn.Linear(16, 3)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x, _ = self.rnn(self.table(input_ids))
        return (self.head(self.two(torch.relu(self.one(x)))),)


@pytest.fixture
def mine() -> Mine:
    model = Mine(MineConfig()).eval()
    model.table = LowRankEmbedding.from_embedding(model.table, 4)
    lstm_ranks = {"weight_hh_l0": 3, "weight_ih_l1": 4}
    model.rnn = LowRankLSTM.from_lstm(model.rnn, lstm_ranks)
    model.one = model.two = LowRankLinear.from_linear(model.one, 5)
    model.head = LowRankLinear.from_linear(model.head, 2)
    return model


def test_a_class_of_ones_own_is_given_and_its_parts_come_back(
    mine: Mine, tmp_path: Path
) -> None:
    ids = torch.arange(12)[None]
    expected = mine(ids)[0]
    save(mine, tmp_path / "model")
    for found in (
        load(tmp_path / "model", cls=Mine),
        Mine.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(found(ids)[0], expected)
        assert found.one is found.two  # it is one module again
        sizes = [sum(p.numel() for p in m.parameters()) for m in (found, mine)]
        assert sizes[0] == sizes[1]
        ranks = {n: rank_of(m) for n, m in low_rank_modules(found).items()}
        assert ranks["rnn"] == {"weight_hh_l0": 3, "weight_ih_l1": 4}
    with pytest.raises(ValueError, match=r"give the class, load\(folder, cls=MyModel"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (3, r"rnn is an LSTM; \{weight: rank\} is needed, not 3"),
        ({"weight_hh_l0": 17}, r"rnn\.weight_hh_l0: the rank is 17; allowed .* 16"),
        ({"weight_hh_l7": 3}, r"rnn has no weight_hh_l7; there are weight_ih_l0"),
        ({"weight_hh_l0": 0}, r"rank of rnn\.weight_hh_l0 is 0"),
    ],
)
def test_ranks_that_an_lstm_cannot_have_are_named(
    mine: Mine, tmp_path: Path, rank: object, message: str
) -> None:
    save(mine, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["sha256"]
    config["quantization_config"]["ranks"]["rnn"] = rank
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model", cls=Mine)


# --- wrappers, states, copies ------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"DataParallel wraps a Bert\w+; .* save\(model\.module, fol"),
        (torch.compile, r"OptimizedModule wraps a Bert\w+; .*save\(model\._orig_mod"),
        (lambda m: nn.Sequential(nn.Identity(), m), r"save\(model\.1, folder\)"),
        (lambda m: m.state_dict(), "of tensors is no model; give the model itself"),
        (lambda m: "folder", "str is no Hugging Face model; save"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_save(
    tiny_bert: PreTrainedModel,
    tmp_path: Path,
    wrap: Callable[[nn.Module], object],
    message: str,
) -> None:
    small = compress(tiny_bert, {"classifier": 1})
    with pytest.raises(TypeError, match=message):
        save(wrap(small), tmp_path / "model")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_model_inside_a_wrapper_knows_its_ranks(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "bert.encoder.layer.0.output.dense"
    small = compress(nn.DataParallel(tiny_bert), {f"module.{name}": 3})
    small.module.save_pretrained(tmp_path / "model")
    found = load(tmp_path / "model")
    assert {n: rank_of(m) for n, m in low_rank_modules(found).items()} == {name: 3}
    with torch.inference_mode():
        expected = small.module(**padded_batch).logits
        assert torch.equal(found(**padded_batch).logits, expected)


def test_an_empty_folder_is_saved_into_and_a_full_one_is_not(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    small = compress(tiny_bert, {"classifier": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(small, tmp_path / "link")
    load(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "empty"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            save(small, tmp_path / name)
    assert [p.name for p in (tmp_path / "full").iterdir()] == [".hidden"]


def test_a_model_with_NaN_is_not_saved(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    small = compress(tiny_bert, {"classifier": 1})
    small.classifier.left.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"classifier\.left has NaN or Inf"):
        save(small, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_pickled_and_copied(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    block = next(iter(attention_blocks(family)))
    small = compress(family, {block: 3})
    with torch.inference_mode():
        expected = small(**padded_batch).logits
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert type(again.get_submodule(block)) is type(small.get_submodule(block))
        with torch.inference_mode():
            assert torch.equal(again(**padded_batch).logits, expected)
        first = next(again.get_submodule(block).parameters())
        first.data.zero_()  # nothing is shared
    with torch.inference_mode():
        assert torch.equal(small(**padded_batch).logits, expected)


def test_a_state_is_read_back_and_never_into_a_dense_model(
    tiny_bert: PreTrainedModel,
) -> None:
    name = "bert.encoder.layer.0.output.dense"
    small = compress(tiny_bert, {name: 3})
    state = small.state_dict()
    assert state[f"{name}.weight"].shape == (1,)  # it says: not dense
    again = compress(tiny_bert, {name: 3})
    again.get_submodule(name).left.data.zero_()
    again.load_state_dict(state)
    assert torch.equal(again.get_submodule(name).left, small.get_submodule(name).left)
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_bert.load_state_dict(state, strict=False)
    remember_ranks(small)  # twice is once
    assert list(small.state_dict()) == list(state)


def test_a_checkpoint_of_trainer_is_loaded(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    small = compress(tiny_bert, {"bert.encoder.layer.0.output.dense": 3})
    rows = [{"input_ids": [5, 6, 7], "labels": n % 2} for n in range(4)]
    recipe = hf.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, use_cpu=True, report_to=[]
    )
    hf.Trainer(small, recipe, train_dataset=rows).train()
    found = load(tmp_path / "run" / "checkpoint-1")
    state = small.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())
