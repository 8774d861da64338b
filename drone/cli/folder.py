"""A folder of a fine-tuned classifier: its model, its tokenizer, and that both fit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from drone.model.masks import POSITIONS
from drone.progress import quiet

# Tables are often rounded up, and a tokenizer may know a few words more. Of another
# model, or made up of special tokens alone, it is off by more than this.
FACTOR = 2


def load_model(folder: Path) -> Any:
    """Read a classifier, dense or compressed, onto the GPU if there is one.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: weights are missing, as a classifier's head that was never trained;
            or the folder has weights that the config has no place for.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; name a model's folder.")
    with quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise ValueError(
            f"{folder}: no weights for {_some(info['missing_keys'])}; a fine-tuned "
            "classifier is needed."
        )
    # Older versions stored buffers that are now computed.
    unread = set(info["unexpected_keys"]) - {name for name, _ in model.named_buffers()}
    if unread:
        raise ValueError(
            f"{folder}: config.json has no place for {_some(unread)}, which "
            "the weights have; the config that the model was trained with is needed."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def load_tokenizer(folder: Path, model: Any) -> Any:
    """Read a model's tokenizer.

    Raises:
        ValueError: it has far fewer words than the model, as one that transformers
            makes up where a folder has none; or far more.
    """
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    words = getattr(model.config.get_text_config(), "vocab_size", None)
    if words is not None and not words / FACTOR <= len(tokenizer) <= words * FACTOR:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} words and its model "
            f"{words}; the model's own tokenizer is needed there (tokenizer.json)."
        )
    return tokenizer


def check_fit(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Refuse rows the model cannot read.

    Raises:
        ValueError: a token beyond its vocabulary, or more tokens than it has positions.
    """
    words = getattr(model.config.get_text_config(), "vocab_size", None)
    places = min(_positions(model), default=None)
    for batch in batches:
        tokens = batch["input_ids"]
        if words is not None and int(tokens.max()) >= words:
            raise ValueError(
                f"the tokenizer gives token {int(tokens.max())}, and the model has "
                f"{words} words, 0 to {words - 1}; its own tokenizer is needed."
            )
        if places is not None and tokens.shape[1] > places:
            raise ValueError(
                f"a row has {tokens.shape[1]} tokens, and the model has {places} "
                f"positions; give --max-length {places} to cut longer rows off."
            )


def _positions(model: nn.Module) -> list[int]:
    """Say how many tokens each table of learnt absolute positions has room for."""
    return [
        module.num_embeddings
        # RoBERTa counts from the first place after its pad's, BART and OPT from 2.
        - (module.padding_idx + 1 if module.padding_idx is not None else 0)
        - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(POSITIONS)
    ]


def _some(names: Iterable[str]) -> str:
    """Name the first three, and say that there are more."""
    every = sorted(names)
    return ", ".join(every[:3]) + (" …" if len(every) > 3 else "")
