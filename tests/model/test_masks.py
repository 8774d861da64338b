"""Pads never count: moments of padded batches against those of rows without pads."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from drone import LeftPaddingWarning, NoMaskWarning, SecondMoment, calibrate
from drone.model.masks import Layouts, Stream

Batch = dict[str, Any]
BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PAIR = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}


def lively(model: nn.Module) -> Any:
    """Weights of a trained model's size: as made, attention is uniform."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = torch.randn_like(parameter) * 0.12
    return model.eval()


def linears(model: nn.Module, *without: str) -> list[str]:
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not any(part in name for part in without)
    ]


def padded(
    rows: int, length: int, left: bool = False
) -> tuple[Tensor, Tensor, list[slice]]:
    """(ids, mask, where the tokens of each row are)."""
    lengths = [max(1, length - 2 * row) for row in range(rows)]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    ids = torch.randint(5, 100, (rows, length)) * mask
    real = [slice(length - n, length) if left else slice(0, n) for n in lengths]
    return ids, mask, real


def text(rows: int = 4, length: int = 12, left: bool = False) -> tuple[Batch, list]:
    """A padded batch, and the same rows one by one without pads."""
    ids, mask, real = padded(rows, length, left)
    alone = [
        {
            "input_ids": ids[row : row + 1, part],
            "attention_mask": mask[row : row + 1, part],
        }
        for row, part in enumerate(real)
    ]
    return {"input_ids": ids, "attention_mask": mask}, alone


def targets(rows: int, length: int) -> tuple[Tensor, list[Tensor]]:
    labels = torch.randint(5, 100, (rows, length))
    alone = []
    for row in range(rows):
        real = max(1, length - 3 * row)
        labels[row, real:] = -100
        alone.append(labels[row : row + 1, :real])
    return labels, alone


def assert_pads_never_count(
    model: nn.Module,
    batch: Batch,
    alone: list[Batch],
    names: list[str] | None = None,
    tolerance: float = 2e-6,
    **options: Any,
) -> dict[str, SecondMoment]:
    names = names or linears(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoMaskWarning)
        warnings.simplefilter("error", LeftPaddingWarning)
        found = calibrate(model, [batch], names, **options)
        expected = calibrate(model, alone, names)
    for name in names:
        right, wrong = expected[name].matrix, found[name].matrix
        assert found[name].count == expected[name].count, name
        assert float((wrong - right).norm()) <= tolerance * float(right.norm()), name
    return found


# --- one sequence ----------------------------------------------------------------


def encoders() -> Iterator[Any]:
    """(name, a model, whether on the left, rows of 12 tokens)."""
    bert = hf.BertConfig(**BERT)
    yield "tokens", hf.BertForTokenClassification(bert), False, 4
    yield "as many rows as tokens", hf.BertForTokenClassification(bert), False, 12
    yield "albert", hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16)), False, 4
    deberta = hf.DebertaV2Config(**BERT, **DEBERTA)
    yield "deberta", hf.DebertaV2ForSequenceClassification(deberta), False, 4
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**BERT, num_key_value_heads=2))
    yield "llama, left", llama, True, 4
    yield "llama, left, square", llama, True, 12
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
    yield "gpt2", hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)), False, 4
    xlnet = hf.XLNetModel(
        hf.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=48)
    )
    yield "xlnet, length first", xlnet, False, 4
    yield "xlnet, square", xlnet, False, 12
    longformer = hf.LongformerConfig(
        **{**BERT, "pad_token_id": 1}, attention_window=[8] * 2
    )
    yield "longformer", hf.LongformerModel(longformer, False), False, 4
    yield "longformer, square in its blocks", hf.LongformerModel(longformer), False, 16


@pytest.mark.parametrize(
    ("model", "left", "rows"),
    [pytest.param(*case[1:], id=case[0]) for case in encoders()],
)
def test_pads_of_one_sequence_never_count(
    model: nn.Module, left: bool, rows: int
) -> None:
    batch, alone = text(rows, 12, left)
    names = linears(model, "global", "pooler")
    found = assert_pads_never_count(lively(model), batch, alone, names)
    real = int(batch["attention_mask"].sum())
    assert real in {moment.count for moment in found.values()}


def test_relative_positions_count_once_a_row_however_long_the_row() -> None:
    # As long as the table of positions, (1, 512): the shapes do not tell them apart.
    sizes = {**BERT, "max_position_embeddings": 512}
    model = lively(hf.DebertaV2Model(hf.DebertaV2Config(**sizes, **DEBERTA)))
    ids, mask = torch.randint(5, 100, (1, 512)), torch.zeros(1, 512, dtype=torch.long)
    mask[:, :90] = 1
    found = assert_pads_never_count(
        model,
        {"input_ids": ids, "attention_mask": mask},
        [{"input_ids": ids[:, :90], "attention_mask": mask[:, :90]}],
    )
    assert {m.count for m in found.values()} == {90, 512 + 90}


def test_one_vector_a_row_is_told_from_one_for_all_rows() -> None:
    layer = nn.ModuleDict({"query_global": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    layouts = Layouts(layer, ["query_global", "other"])
    stream, x = Stream(torch.ones(3, 5).bool(), known=True), torch.zeros(1, 3, 4)
    assert layouts.lay(stream, ("query_global", 0), 0, x) == (None, 1)
    with pytest.raises(ValueError, match="one way or another"):
        layouts.lay(stream, ("other", 0), 0, x)


def test_a_layer_that_is_run_many_times_counts_every_run() -> None:
    model = lively(hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16)))
    batch, _ = text()
    names = linears(model, "pooler", "mapping")
    found = calibrate(model, [batch], names)
    assert {moment.count for moment in found.values()} == {
        2 * int(batch["attention_mask"].sum())
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("rows", [3, 12])
def test_pads_of_pytorchs_encoder_never_count(batch_first: bool, rows: int) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors need batch_first
        model = lively(nn.TransformerEncoder(layer, 2))
    x, (_, mask, real) = torch.randn(rows, 12, 32), padded(rows, 12)

    def lie(part: Tensor) -> Tensor:
        return part if batch_first else part.transpose(0, 1)

    alone = [
        {
            "src": lie(x[r : r + 1, part]),
            "src_key_padding_mask": mask[r : r + 1, part] == 0,
        }
        for r, part in enumerate(real)
    ]
    batch = {"src": lie(x), "src_key_padding_mask": mask == 0}
    fast = torch.backends.mha.get_fastpath_enabled()
    assert_pads_never_count(model, batch, alone, linears(model, "out_proj"))
    assert torch.backends.mha.get_fastpath_enabled() is fast


# --- two sequences ---------------------------------------------------------------


def pairs() -> Iterator[Any]:
    t5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    yield (
        "t5",
        hf.T5ForConditionalGeneration(
            hf.T5Config(**t5, num_heads=4, decoder_start_token_id=0)
        ),
    )
    yield "bart", hf.BartForConditionalGeneration(hf.BartConfig(**PAIR))
    both = hf.EncoderDecoderModel(
        encoder=hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False),
        decoder=hf.BertLMHeadModel(
            hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
        ),
    )
    both.config.decoder_start_token_id, both.config.pad_token_id = 1, 0
    yield "two berts", both


@pytest.mark.parametrize("length", [12, 7], ids=["as long as the source", "shorter"])
@pytest.mark.parametrize(
    "model", [pytest.param(case[1], id=case[0]) for case in pairs()]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_encoder_decoder_and_what_one_sees_of_the_other_have_their_own_masks(
    model: nn.Module, length: int
) -> None:
    batch, alone = text()
    labels, rows = targets(4, length)
    found = assert_pads_never_count(
        lively(model),
        {**batch, "labels": labels},
        [{**one, "labels": row} for one, row in zip(alone, rows, strict=True)],
    )
    source, target = int(batch["attention_mask"].sum()), int((labels != -100).sum())
    assert {moment.count for moment in found.values()} == {source, target}


def test_the_decoders_own_mask_comes_before_its_labels() -> None:
    model = lively(hf.BartForConditionalGeneration(hf.BartConfig(**PAIR)))
    batch, _ = text()
    ids, mask, _ = padded(4, 5)
    batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    batch["labels"] = torch.where(mask == 1, ids, 3)  # no -100: it says nothing
    names = ["model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"]
    inner, outer = calibrate(model, [batch], names).values()
    assert inner.count == int(mask.sum())
    assert outer.count == int(batch["attention_mask"].sum())


def test_a_decoder_without_mask_or_labels_counts_whole_and_says_so() -> None:
    model = lively(hf.BartForConditionalGeneration(hf.BartConfig(**PAIR)))
    batch, _ = text()
    batch["decoder_input_ids"] = padded(4, 12)[0]  # as long: the encoder's mask fits
    name = "model.decoder.layers.0.fc1"
    with pytest.warns(NoMaskWarning, match=name):
        assert calibrate(model, [batch], [name])[name].count == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = calibrate(model, [batch], [name], mask={"model.decoder": None})
    assert told[name].count == 48


def test_a_label_left_out_in_the_middle_is_a_token_all_the_same() -> None:
    model = lively(hf.BartForConditionalGeneration(hf.BartConfig(**PAIR)))
    batch, _ = text(1)
    batch["labels"] = torch.tensor([[-100, 5, -100, 7, -100]])
    name = "model.decoder.layers.0.fc1"
    assert calibrate(model, [batch], [name])[name].count == 4


def test_pytorchs_transformer_has_three_masks() -> None:
    model = lively(nn.Transformer(32, 4, 2, 2, 48, batch_first=True))
    x, y = torch.randn(4, 12, 32), torch.randn(4, 12, 32)
    (_, source, here), (_, target, _) = padded(4, 12), padded(4, 12)
    target = target.flip(0)
    there = [slice(0, int(row.sum())) for row in target]
    batch = {
        "src": x,
        "tgt": y,
        "src_key_padding_mask": source == 0,
        "tgt_key_padding_mask": target == 0,
        "memory_key_padding_mask": source == 0,
    }
    alone = [
        {
            "src": x[r : r + 1, here[r]],
            "tgt": y[r : r + 1, there[r]],
            "src_key_padding_mask": source[r : r + 1, here[r]] == 0,
            "tgt_key_padding_mask": target[r : r + 1, there[r]] == 0,
        }
        for r in range(4)
    ]
    assert_pads_never_count(model, batch, alone, linears(model, "out_proj"))


# --- images and sound ------------------------------------------------------------


def test_images_have_no_pads() -> None:
    sizes = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2}
    config = hf.ViTConfig(
        **sizes, hidden_size=32, num_attention_heads=4, intermediate_size=48
    )
    model, x = lively(hf.ViTForImageClassification(config)), torch.randn(4, 3, 16, 16)
    alone = [{"pixel_values": image[None]} for image in x]
    assert_pads_never_count(model, {"pixel_values": x}, alone)


def test_a_tower_of_images_does_not_take_the_mask_of_the_text() -> None:
    vision = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2}
    vision |= {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    words = {**BERT, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=words, vision_config=vision, projection_dim=16)
    model = lively(hf.CLIPModel(config))
    batch, alone = text(4, 17)  # as many tokens as patches
    for part, one in enumerate(alone):  # CLIP reads the text at its end token
        batch["input_ids"][part, one["input_ids"].shape[1] - 1] = 2
    x = torch.randn(4, 3, 16, 16)
    assert_pads_never_count(
        model,
        {**batch, "pixel_values": x},
        [{**one, "pixel_values": x[r : r + 1]} for r, one in enumerate(alone)],
    )


def test_whispers_decoder_has_the_pads_of_its_labels_its_encoder_none() -> None:
    config = hf.WhisperConfig(
        **PAIR,
        max_source_positions=20,
        num_mel_bins=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = lively(hf.WhisperForConditionalGeneration(config))
    sound, (labels, rows) = torch.randn(3, 16, 40), targets(3, 20)
    found = assert_pads_never_count(
        model,
        {"input_features": sound, "labels": labels},
        [
            {"input_features": sound[r : r + 1], "labels": row}
            for r, row in enumerate(rows)
        ],
    )
    counts = {moment.count for moment in found.values()}
    assert counts == {int((labels != -100).sum()), 3 * 20}


def test_frames_of_sound_take_what_convolutions_leave_of_the_mask() -> None:
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    model, lengths = lively(hf.Wav2Vec2ForCTC(config)), [400, 300, 150]
    mask = (torch.arange(400) < torch.tensor(lengths)[:, None]).long()
    sound = torch.randn(3, 400) * mask
    alone = [
        {
            "input_values": sound[r : r + 1, :n],
            "attention_mask": mask[r : r + 1, :n],
        }
        for r, n in enumerate(lengths)
    ]
    batch = {"input_values": sound, "attention_mask": mask}
    assert_pads_never_count(model, batch, alone)


# --- where the mask is -----------------------------------------------------------


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = hf.BertModel(hf.BertConfig(**BERT))

    def forward(self, features: Batch) -> Any:
        mask = features["attention_mask"]
        return self.model(features["input_ids"], mask)


def test_a_dict_inside_the_batch_or_as_the_only_argument() -> None:
    model = lively(nn.Sequential(Body()))
    batch, alone = text()
    nested = [{"input": one} for one in alone]
    for given in (batch, {"input": batch}):
        assert_pads_never_count(model, given, nested)


class Words(nn.Module):
    """A module of no known kind; its mask has a name nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.b(self.a(x))


def test_where_no_mask_is_known_all_count_and_a_warning_names_the_module() -> None:
    x, real = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"x": x, "real": real}
    with pytest.warns(NoMaskWarning, match="a, b: every position counts"):
        assert calibrate(Words(), [batch], ["a", "b"])["a"].count == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(Words(), [{"x": x[:1]}], ["a"])  # one row has no pads
        calibrate(Words(), [{"x": x[:, 0]}], ["a"])  # nor have single vectors


def test_mask_says_what_counts_by_name_or_by_function() -> None:
    x, real = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"x": x, "real": real}
    given: list[Any] = [
        {"": "real", "b": None},
        lambda name, batch, x: batch["real"] if name == "a" else None,
    ]
    for mask in given:
        a, b = calibrate(Words(), [batch], ["a", "b"], mask=mask).values()
        rows = x[real.bool()].double()
        torch.testing.assert_close(a.matrix, rows.T @ rows)
        assert (a.count, b.count) == (3, 8)


def test_a_mask_that_is_none_or_does_not_exist_is_refused() -> None:
    batch = {"x": torch.randn(2, 4, 3), "real": torch.full((2, 4), 0.5)}
    with pytest.raises(ValueError, match="a: batch 0 has no 'other'"):
        calibrate(Words(), [batch], ["a"], mask={"a": "other"})
    with pytest.raises(ValueError, match="a: mask= gives no tensor of 0"):
        calibrate(Words(), [batch], ["a"], mask={"": "real"})


@pytest.mark.parametrize("pad", [-torch.inf, -1.0, 2.0])
def test_an_additive_mask_is_refused(pad: float) -> None:
    batch, _ = text()
    mask = torch.where(batch["attention_mask"] == 1, 0.0, pad)
    model = hf.BertModel(hf.BertConfig(**BERT))
    with pytest.raises(ValueError, match="batch 0: attention_mask has values other"):
        calibrate(model, [{**batch, "attention_mask": mask}])


def test_what_no_mask_fits_is_refused_by_name_unless_there_are_no_pads() -> None:
    class Shorter(Words):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x[:, ::2])

    x, mask = torch.randn(2, 6, 3), torch.ones(2, 6)
    assert calibrate(Shorter(), [{"x": x, "attention_mask": mask}], ["a"])["a"].count
    mask[0, 5] = 0
    with pytest.raises(ValueError, match=r"a, batch 1: .*\(2, 6\); \(2, 3\) is needed"):
        one = {"x": x, "attention_mask": torch.ones(2, 6)}
        two = {"x": x, "attention_mask": mask}
        calibrate(Shorter(), [one, two], ["a"])


class Routed(nn.Module):
    """Two experts; each token goes to the one that `route` names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(
        self, x: Tensor, route: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        flat, to = x.reshape(-1, 8), route.reshape(-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            y[to == number] = expert(flat[to == number])
        return y


@pytest.mark.parametrize(("tokens", "pads"), [(9, 3), (2, 2)], ids=["real", "rows"])
def test_as_many_tokens_as_real_ones_or_rows_by_chance_are_refused(
    tokens: int, pads: int
) -> None:
    mask, route = torch.ones(2, 6).long(), torch.ones(2, 6).long()
    mask[1, 3:] = 0
    route[1, 6 - pads :] = 0
    route[0, : tokens - pads] = 0
    batch = {"x": torch.randn(2, 6, 8), "attention_mask": mask, "route": route}
    model = Routed().eval()
    with pytest.raises(ValueError, match=r"experts\.0, batch 0: the mask has shape"):
        calibrate(model, [batch], ["experts.0"])
    # Of a model that cuts pads away, as many vectors as tokens are the tokens.
    model.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    if tokens == 9:
        assert calibrate(model, [batch], ["experts.0"])["experts.0"].count == 9


def test_pads_of_an_image_beside_a_text_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    model = hf.ViltModel(hf.ViltConfig(vocab_size=120, **sizes, **more)).eval()
    ids, pixels = torch.randint(5, 100, (2, 6)), torch.ones(2, 32, 32).long()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": pixels,
    }
    name = "encoder.layer.0.output.dense"
    assert calibrate(model, [batch], [name])[name].count == 2 * (6 + 17)
    pixels[1, :, 16:] = 0
    with pytest.raises(ValueError, match=rf"{name}, batch 0: .*\(2, 32, 32\)"):
        calibrate(model, [batch], [name])


def test_sound_that_may_have_pads_is_warned_of_without_a_mask() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "conv_channels": 16}
    config = hf.Speech2TextConfig(
        **PAIR | sizes,
        input_feat_per_channel=8,
        max_source_positions=64,
        num_conv_layers=1,
        conv_kernel_sizes=(3,),
    )
    model = hf.Speech2TextForConditionalGeneration(config).eval()
    batch = {
        "input_features": torch.randn(2, 20, 8),
        "labels": torch.randint(3, 50, (2, 6)),
    }
    name = "model.encoder.layers.0.fc1"
    with pytest.warns(NoMaskWarning, match=name):
        calibrate(model, [batch], [name])


def test_a_model_that_cannot_take_one_row_more_is_refused_not_guessed() -> None:
    class Fixed(Words):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x.reshape(4, 4, 3))

    batch = {"x": torch.randn(4, 4, 3), "attention_mask": torch.ones(4, 4).tril()}
    with pytest.raises(ValueError, match="batch 0 has as many rows as tokens"):
        calibrate(Fixed(), [batch], ["a"])


# --- pads on the left ------------------------------------------------------------


def test_left_pads_under_absolute_positions_are_warned_of() -> None:
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4}
    gpt2 = lively(hf.GPT2Model(hf.GPT2Config(**sizes)))
    batch, alone = text(left=True)
    with pytest.warns(LeftPaddingWarning, match="wpe gives positions from the left"):
        calibrate(gpt2, [batch], linears(gpt2))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_pads_never_count(gpt2, {**batch, "position_ids": positions}, alone)
