"""Families of models, tiny and with random weights, and what works with each.

`make models` writes the outcome to book/models.md; `test_families.py` reads both.
"""

import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import drone
from drone.layers.linear import as_linear, is_linear
from drone.model.calibrate import frozen
from drone.model.walk import Walk
from drone.search.costs import Costs, ModuleCosts

PAGE = Path(__file__).parents[2] / "book" / "models.md"
VOCABULARY, LENGTHS = 60, (9, 6, 4)
Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One family: how it is built, and what its rows are.

    Attributes:
        name: as the page shows it.
        kind: encoder, decoder, experts, seq2seq, vision, audio, towers or plain.
        build: makes the model.
        rows: makes rows, each a batch of one without a pad.
        collate: puts rows into one batch, padded where they differ in length.
        modules: names to compress; None: all that the library finds by itself.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    rows: Callable[[], list[Batch]]
    collate: Callable[[list[Batch]], Batch]
    modules: tuple[str, ...] | None = None


# --- rows


def pad(tensors: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([t[0] for t in tensors], True, value)


def padded(rows: list[Batch]) -> Batch:
    """Pad ids with 1 and masks with 0; labels a token with -100, others in a row."""
    batch = {}
    for key in rows[0]:
        tensors = [row[key] for row in rows]
        if tensors[0].ndim == 2 and not tensors[0].is_floating_point():
            value = 0 if "mask" in key else -100 if key == "labels" else 1
            batch[key] = pad(tensors, value)
        else:
            batch[key] = torch.cat(tensors)
    return batch


def text_rows(labels: str, lengths: tuple[int, ...] = LENGTHS) -> list[Batch]:
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(5, VOCABULARY, (1, length))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labels == "row":
            row["labels"] = torch.tensor([number % 2])
        elif labels == "token":
            row["labels"] = ids
        elif labels == "target":  # shorter than the source, and of unlike lengths
            row["labels"] = torch.randint(5, VOCABULARY, (1, length - 2))
        found.append(row)
    return found


def float_rows(name: str, *shape: int, labels: str = "row") -> list[Batch]:
    found: list[Batch] = []
    for number in range(3):
        row = {name: torch.randn(1, *shape)}
        if labels == "row":
            row["labels"] = torch.tensor([number % 2])
        elif labels == "target":
            row["labels"] = torch.randint(5, VOCABULARY, (1, 5 - number))
        found.append(row)
    return found


def tower_rows() -> list[Batch]:
    texts, images = text_rows(""), float_rows("pixel_values", 3, 16, 16, labels="")
    return [a | b | {"return_loss": True} for a, b in zip(texts, images, strict=True)]


def collate_towers(rows: list[Batch]) -> Batch:
    plain = [{k: v for k, v in row.items() if k != "return_loss"} for row in rows]
    return padded(plain) | {"return_loss": True}


# --- families


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LLAMA = BERT | {"num_key_value_heads": 2}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
}


def lively(model: nn.Module) -> nn.Module:
    """Draw weights of a trained model's size: a forgotten one would be seen."""
    for module in model.modules():
        if is_linear(module):
            linear = as_linear(module)
            nn.init.normal_(module.weight, std=linear.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def hub(
    name: str,
    kind: str,
    head: str,
    settings: dict[str, Any],
    rows: Callable[[], list[Batch]],
    collate: Callable[[list[Batch]], Batch] = padded,
    config: str = "",
) -> Family:
    def build() -> nn.Module:
        made = getattr(transformers, config or f"{head.split('For')[0]}Config")
        return lively(getattr(transformers, head)(made(**settings)))

    return Family(name, kind, build, rows, collate)


def encoder(
    stem: str, name: str = "", lengths: tuple[int, ...] = LENGTHS, **more: Any
) -> Family:
    return hub(
        name or stem,
        "encoder",
        f"{stem}ForSequenceClassification",
        BERT | more,
        lambda: text_rows("row", lengths),
        config=f"{stem}Config",
    )


def decoder(stem: str, name: str = "", kind: str = "decoder", **more: Any) -> Family:
    return hub(
        name or stem,
        kind,
        f"{stem}ForCausalLM",
        LLAMA | more,
        lambda: text_rows("token"),
        config=f"{stem}Config",
    )


def seq2seq(stem: str, head: str = "", **more: Any) -> Family:
    head = head or f"{stem}ForConditionalGeneration"
    settings = more.pop("settings", BART) | more
    rows = more.pop("rows", lambda: text_rows("target"))
    return hub(stem, "seq2seq", head, settings, rows, config=f"{stem}Config")


def vision(stem: str, **more: Any) -> Family:
    settings = more.pop("settings", VIT) | more
    head = f"{stem}ForImageClassification"
    rows = lambda: float_rows("pixel_values", 3, 16, 16)  # noqa: E731
    return hub(stem, "vision", head, settings, rows, config=f"{stem}Config")


def towers(stem: str, text: dict[str, Any]) -> Family:
    def build() -> nn.Module:
        config = getattr(transformers, f"{stem}Config")(
            text_config=BERT | text, vision_config=VIT, projection_dim=16
        )
        return lively(getattr(transformers, f"{stem}Model")(config))

    return Family(stem, "towers", build, tower_rows, collate_towers)


class Classifier(nn.Module):
    """A body, its mean over the length, a head: what one writes by hand."""

    def __init__(self, body: nn.Module, **call: Any) -> None:
        super().__init__()
        self.body, self.head, self.call = body, nn.Linear(32, 2), call

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        states = self.body(x, **self.call)
        states = states[0] if isinstance(states, tuple) else states
        logits = self.head(states.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def plain(name: str, body: Callable[[], nn.Module], *modules: str) -> Family:
    return Family(
        name,
        "plain",
        lambda: lively(Classifier(body())),
        lambda: float_rows("x", 7, 32),
        padded,
        modules or None,
    )


def torch_encoder(layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1]}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

FAMILIES = [
    encoder("Bert", "BERT"),
    encoder("Roberta", "RoBERTa"),
    hub(
        "DistilBERT",
        "encoder",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4}
        | {"hidden_dim": 48, "max_position_embeddings": 64, "pad_token_id": 1},
        lambda: text_rows("row"),
    ),
    encoder("MPNet"),
    encoder("Albert", "ALBERT (shared layers)", embedding_size=16),
    encoder("Electra", "ELECTRA", embedding_size=16),
    encoder("DebertaV2", "DeBERTa-v3", **DEBERTA),
    encoder("DebertaV2", "DeBERTa-v2 xlarge", conv_kernel_size=3, **DEBERTA),
    encoder("ModernBert", "ModernBERT", cls_token_id=0, sep_token_id=2),
    hub(
        "XLNet",
        "encoder",
        "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4}
        | {"d_inner": 48, "pad_token_id": 1},
        lambda: text_rows("row"),
    ),
    encoder("FNet"),
    encoder("Nystromformer", "Nyströmformer", num_landmarks=4, segment_means_seq_len=4),
    encoder("SqueezeBert", "SqueezeBERT", embedding_size=32),
    encoder(
        "MobileBert", "MobileBERT", embedding_size=16, intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    # It pads a row to its window by itself: these lengths need no such pads.
    encoder("Longformer", lengths=(12, 8, 4), attention_window=[4, 4]),
    encoder("BigBird", attention_type="original_full"),
    encoder("RoFormer", embedding_size=32),
    encoder("MegatronBert", "Megatron-BERT"),
    encoder("ConvBert", "ConvBERT", embedding_size=32, head_ratio=2),
    decoder("Llama", "LLaMA"),
    decoder("Mistral"),
    decoder("Qwen2"),
    decoder("Qwen3", head_dim=8),
    decoder("Gemma", head_dim=8),
    decoder("Gemma2", head_dim=8, sliding_window=4),
    decoder("Phi"),
    decoder("Phi3", "Phi-3"),
    decoder("StableLm", "StableLM"),
    decoder("Olmo2", "OLMo 2"),
    decoder("GPTNeoX", "GPT-NeoX"),
    decoder("OPT", ffn_dim=48, word_embed_proj_dim=32),
    decoder("Bloom", "BLOOM", n_layer=2, n_head=4),
    decoder("Falcon"),
    hub("GPT-2", "decoder", "GPT2LMHeadModel", GPT2, lambda: text_rows("token"),
        config="GPT2Config"),
    decoder("Mixtral", kind="experts", num_local_experts=4, **EXPERTS),
    decoder(
        "Qwen2Moe", "Qwen2-MoE", "experts", num_experts=4, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, **EXPERTS,
    ),
    seq2seq("T5", settings=T5),
    seq2seq("MT5", settings=T5 | {"feed_forward_proj": "gated-gelu"}),
    seq2seq("Bart"),
    seq2seq("MBart"),
    seq2seq("Pegasus"),
    seq2seq("Marian", "MarianMTModel"),
    hub(
        "Whisper",
        "seq2seq",
        "WhisperForConditionalGeneration",
        BART | {"max_source_positions": 20, "max_target_positions": 32}
        | {"num_mel_bins": 16},
        lambda: float_rows("input_features", 16, 40, labels="target"),
    ),
    vision("ViT"),
    vision("DeiT"),
    vision("Beit"),
    vision("Dinov2", mlp_ratio=2),
    vision(
        "Swin",
        settings=STAGES | {"num_heads": [2, 2], "window_size": 2, "mlp_ratio": 2},
    ),
    vision(
        "Segformer",
        settings={"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]}
        | {"hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2]}
        | {"num_attention_heads": [2, 2], "mlp_ratios": [2, 2]},
    ),
    hub("Wav2Vec2", "audio", "Wav2Vec2ForSequenceClassification", SPEECH,
        lambda: float_rows("input_values", 400)),
    hub("HuBERT", "audio", "HubertForSequenceClassification", SPEECH,
        lambda: float_rows("input_values", 400), config="HubertConfig"),
    hub(
        "AST",
        "audio",
        "ASTForAudioClassification",
        {k: v for k, v in VIT.items() if k != "image_size"}
        | {"max_length": 16, "num_mel_bins": 16, "frequency_stride": 4}
        | {"time_stride": 4},
        lambda: float_rows("input_values", 16, 16),
    ),
    towers("CLIP", {}),
    towers("Siglip", {}),
    plain("nn.Sequential", lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(),
                                                 nn.Linear(48, 32))),
    plain("nn.TransformerEncoder", torch_encoder),
    plain("nn.LSTM and a Linear", lambda: nn.LSTM(32, 32, batch_first=True), "head"),
]  # fmt: skip


# --- what is checked


@dataclass
class Outcome:
    """What came of each check: "yes", a remark, or the sentence of the error."""

    name: str
    kind: str
    modules: int = 0
    masks: str = ""
    full: str = ""
    best: str = ""
    order: str = ""
    search: str = ""
    saved: str = ""


CHECKS = ("masks", "full", "best", "order", "search", "saved")


@contextmanager
def seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(sum(map(ord, name)))
        yield


def named(family: Family, model: nn.Module) -> list[str]:
    return list(family.modules or drone.encoder_linears(model))


def first_tensor(output: Any) -> Tensor:
    """Return the logits, or the first tensor that is no loss."""
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return next(v for k, v in items if isinstance(v, Tensor) and v.ndim > 0)


def by_hand(model: nn.Module, rows: list[Batch], names: list[str]) -> dict[str, Any]:
    """Count and sum what enters each module, row by row, so that nothing is padded."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with frozen(model):
        for row in rows:
            model(**row)
    for handle in handles:
        handle.remove()
    vectors = {name: torch.cat(xs).double() for name, xs in found.items() if xs}
    return {name: (len(x), x.T @ x) for name, x in vectors.items()}


PADS_MATTER = "pads change what this model itself gives"


def pads_matter(model: nn.Module, rows: list[Batch], batch: Batch) -> bool:
    """Whether a row gives something else alone than beside longer rows."""
    with frozen(model):
        alone = torch.cat([first_tensor(model(**row)) for row in rows])
        return not torch.allclose(alone, first_tensor(model(**batch)), atol=1e-4)


def check_masks(
    family: Family, model: nn.Module, rows: list[Batch], moments: Any, hand: Any
) -> str:
    said = "yes"
    for name, (count, matrix) in hand.items():
        distance = (moments[name].matrix - matrix).norm() / matrix.norm()
        if moments[name].count != count:
            said = f"{name}: {moments[name].count} vectors counted, {count} are real"
        elif distance > 1e-3:
            said = f"{name}: its moment is {distance:.0%} off"
        if said != "yes":
            break
    # Where a row alone gives something else, no mask could bring its inputs back.
    if said != "yes" and pads_matter(model, rows, family.collate(rows)):
        return PADS_MATTER
    return said


def check_full(family: Family, model: nn.Module, batch: Batch, moments: Any) -> str:
    full = {
        name: min(as_linear(model.get_submodule(name)).weight.shape) for name in moments
    }
    small = drone.compress(model, full, moments)
    with torch.no_grad():
        a, b = first_tensor(model(**batch)), first_tensor(small(**batch))
    distance = float((a - b).norm() / a.norm())
    return "yes" if distance < 1e-4 else f"outputs differ by {distance:.1e}"


def check_best(model: nn.Module, moments: dict[str, drone.SecondMoment]) -> str:
    for name, moment in moments.items():
        weight = as_linear(model.get_submodule(name)).weight.detach().double()
        rank = max(1, min(weight.shape) // 3)
        ours = float(drone.factorize(weight, moment).errors[rank])
        left, right = drone.factorize(weight).truncate(rank)
        missing = weight - left @ right
        svd = float((missing @ moment.matrix @ missing.T).trace().clamp(min=0).sqrt())
        if ours > svd * (1 + 1e-6) + 1e-9:
            return f"{name}: error {ours:.4g}, by plain SVD {svd:.4g}"
    return "yes"


def ranks_of(model: nn.Module, names: list[str]) -> dict[str, int]:
    return {
        name: max(1, min(as_linear(model.get_submodule(name)).weight.shape) // 3)
        for name in names
    }


def check_order(model: nn.Module, names: list[str], batches: list[Batch]) -> str:
    with frozen(model):
        why = Walk(model, batches, names).why_whole
    small = drone.compress(
        model, ranks_of(model, names), batches=batches, sequential=True
    )
    thin = [m for m in small.modules() if isinstance(m, drone.LowRankLinear)]
    assert len(thin) == len(names)
    with torch.no_grad():
        assert first_tensor(small(**batches[0])).isfinite().all()
    return "whole passes" if why else "layer by layer"


def check_search(model: nn.Module, names: list[str], batches: list[Batch]) -> str:
    ranks = ranks_of(model, names)
    costs = {}
    for name, rank in ranks.items():
        out, into = as_linear(model.get_submodule(name)).weight.shape
        weights = (rank * (out + into), out * into)
        costs[name] = ModuleCosts(f"{out}×{into}", (rank,), weights, (0.5, 1.0))
    plan = drone.search_ranks(
        model, batches, 0.2, modules=names, times=Costs(100.0, costs)
    )
    assert plan.loss <= plan.dense_loss * 1.2
    drone.search_ranks(
        model, batches, 0.9, modules=names, times=Costs(100.0, costs),
        method="uniform", target="parameters",
    )  # fmt: skip
    return "yes"


def check_saved(small: nn.Module, batch: Batch) -> str:
    folder = Path(tempfile.mkdtemp()) / "small"
    try:
        drone.save(small, folder)
        again = drone.load(folder)
        with torch.no_grad():
            a, b = first_tensor(small(**batch)), first_tensor(again(**batch))
        return "yes" if torch.equal(a, b) else "the loaded model differs"
    finally:
        shutil.rmtree(folder.parent)


def attempt(check: Callable[..., str], *args: Any) -> str:
    try:
        return check(*args)
    except Exception as error:
        kind = "" if isinstance(error, ValueError | TypeError) else repr(error)[:60]
        text = kind or str(error)
        return "error: " + " ".join(text.split()).replace("|", "/")[:300]


@cache
def outcome(index: int) -> Outcome:
    """Make every check on one family."""
    family = FAMILIES[index]
    with seeded(family.name):
        model, rows = family.build(), family.rows()
        batches = [family.collate(rows), family.collate(rows[1:])]
        found = Outcome(family.name, family.kind)
        try:
            names = named(family, model)
            moments = drone.calibrate(model, batches, names)
        except Exception as error:
            text = attempt(lambda e: (_ for _ in ()).throw(e), error)
            for check in CHECKS:
                setattr(found, check, text)
            return found
        found.modules = len(names)
        hand = by_hand(model, [*rows, *rows[1:]], names)
        found.masks = attempt(check_masks, family, model, rows, moments, hand)
        found.full = attempt(check_full, family, model, batches[0], moments)
        found.best = attempt(check_best, model, moments)
        found.order = attempt(check_order, model, names, batches)
        found.search = attempt(check_search, model, names, batches)
        small = drone.compress(model, ranks_of(model, names), moments)
        found.saved = attempt(check_saved, small, batches[0])
        return found


def outcomes() -> list[Outcome]:
    """Make every check on every family."""
    return [outcome(index) for index in range(len(FAMILIES))]


# --- the page


KINDS = {
    "encoder": "Encoders of text",
    "decoder": "Decoders",
    "experts": "Mixtures of experts",
    "seq2seq": "Encoders with a decoder",
    "vision": "Images",
    "audio": "Sound",
    "towers": "Two towers",
    "plain": "Plain PyTorch",
}
REMEDIES = {
    "SqueezeBERT": "Its layers are grouped convolutions, which `drone` does not "
    "factorize: there is nothing to compress but the pooler and the head.",
    "FNet": "It mixes all positions of a row, pads too, and takes no mask. Put rows of "
    "one length into a batch.",
    "Nyströmformer": "Its landmarks are means over all positions, pads too. Put rows "
    "of one length into a batch.",
    "ConvBERT": "Its convolutions run over the pads beside a token. Put rows of one "
    "length into a batch.",
    "nn.Sequential": "Save the `state_dict()` yourself; ranks are in `drone.report`.",
}
for _name in ("nn.TransformerEncoder", "nn.LSTM and a Linear"):
    REMEDIES[_name] = REMEDIES["nn.Sequential"]
HEAD = """# Models that work

<!-- Written by `make models`; tests/model/test_families.py compares it. -->

`drone` compresses any PyTorch model whose weights are in `nn.Linear` layers (or in
GPT-2's `Conv1D`, which is a transposed one). This page says with which families that
was tried, and what came of it. Each model here is tiny and has random weights: it shows
that the machinery is right, not how much of a trained model can be taken away.

What the columns say:

- **Linears**: how many the library finds by itself, in the lists of layers.
- **pads**: each module's inputs were counted as if every row had been run alone.
- **full rank**: at full rank the outputs are those of the dense model, to 1e-4.
- **best**: the data-aware error on its own calibration data is never above that of SVD.
- **sequential**: how `compress(sequential=True)` runs. *Layer by layer* keeps the
  hidden states and costs a few forward passes. *Whole passes* runs the whole model
  for each group of modules: slower, and right where something happens between the
  layers, where layers get different arguments, or where there are two towers. The walk
  proves on every batch which of the two is right.
- **search**: `search_ranks` runs, with the paper's method and with a share of the
  parameters.
- **saved**: after `save` and `load` the outputs are equal to the last bit.
"""
TAIL = """## What to know

- In transformers 5 the experts of a mixture are one tensor with three axes and no
  `nn.Linear`. They stay dense; attention and shared experts are compressed.
- A module that stands in several places (ALBERT's layers) is replaced in all of them.
- Where two modules share a weight (an embedding and a decoder), compressing one of them
  leaves the other the dense weight: the model grows. `BrokenTieWarning` says so, and
  `report` counts it.
- `nn.TransformerEncoder` and `nn.MultiheadAttention` multiply with the weight of a
  layer and do not call it. A thin layer there is right and smaller, but not faster;
  `report` says so. The inputs of `out_proj` cannot be seen, so only plain SVD can
  replace it.
- An adapter (LoRA), a hook, a parametrization (`weight_norm`) and a subclass of
  `nn.Linear` with a forward of its own would be lost. Such a module is refused by its
  name. Merge the adapter first: `model = model.merge_and_unload()`.
- Another list of layers than the one found: `compress(..., layers="decoder.block")`.
"""


def page(found: list[Outcome]) -> str:
    """Write the page: a table a kind, then what does not work and what to do."""
    lines = [HEAD]
    for kind, title in KINDS.items():
        lines += [f"## {title}\n"]
        columns = ["model", "Linears", "pads", "full rank", "best", "sequential"]
        columns += ["search", "saved"]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for each in found:
            if each.kind == kind:
                cells = [getattr(each, check) for check in CHECKS]
                shown = ["no" if not _good(cell) else cell for cell in cells]
                lines += [f"| {each.name} | {each.modules} | {' | '.join(shown)} |"]
        lines += [""]
    lines += ["## What does not, and what to do\n"]
    for each in found:
        told = {getattr(each, c): None for c in CHECKS if not _good(getattr(each, c))}
        if told:
            said = "; ".join(text.removeprefix("error: ").rstrip(".") for text in told)
            lines += [
                f"**{each.name}**: *{said}.* {REMEDIES.get(each.name, '')}".rstrip(),
                "",
            ]
    return "\n".join([*lines, TAIL])


def _good(cell: str) -> bool:
    return cell in ("yes", "layer by layer", "whole passes")


if __name__ == "__main__":
    if sys.argv[1:]:
        for index, family in enumerate(FAMILIES):
            if family.name in sys.argv[1:]:
                print(outcome(index), flush=True)
    else:
        PAGE.write_text(page(outcomes()), encoding="utf-8")
