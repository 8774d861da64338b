"""A compressed model as an ordinary Hugging Face folder, safetensors and config."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from drone.files import whole_folder
from drone.layers.attention import LowRankSelfAttention, attention_heads, query_and_key
from drone.layers.embedding import LowRankEmbedding
from drone.layers.linear import LowRankLinear, as_linear, is_linear
from drone.model.adapters import module_named, swap
from drone.progress import quiet

LowRank = LowRankLinear | LowRankSelfAttention | LowRankEmbedding
FORMAT_VERSION = 1
METHOD = "drone"  # what config.json calls it


@register_quantization_config(METHOD)
class DroneConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model. Read by transformers itself."""

    def __init__(
        self, ranks: dict[str, int], format_version: int = FORMAT_VERSION, **_: Any
    ) -> None:
        """Take {module name: rank} and the format's version.

        Raises:
            ValueError: the version is not the one this library reads.
        """
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"the model was saved in format {format_version}; this version of "
                f"drone reads format {FORMAT_VERSION}."
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an Enum
        self.format_version = format_version
        self.ranks = ranks


@register_quantizer(METHOD)
class DroneLoader(HfQuantizer):
    """Lets `from_pretrained` build the thin modules before it reads the weights.

    transformers' hook for quantized models is the one place where a library may
    replace modules while a model loads; nothing here is quantized.
    """

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> nn.Module:
        assert isinstance(self.quantization_config, DroneConfig)  # registered for it
        names = _names_in(model, self.quantization_config.ranks)
        # Blocks first: they take over the other projections, by the same names.
        for name in sorted(names, key=lambda n: is_linear(module_named(model, n))):
            swap(model, name, _skeleton(module_named(model, name), name, names[name]))
        untie_replaced(model)
        if checkpoint_files:
            _check_tensors(model, names, [Path(file) for file in checkpoint_files])
        return model

    def _process_model_after_weight_loading(
        self, model: nn.Module, **_: Any
    ) -> nn.Module:
        # It trains, casts and moves like any model: only its config remembers.
        del model.hf_quantizer, model.quantization_method
        setattr(model, "is_quantized", False)  # noqa: B010
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        remember_ranks(model)  # an encoder read alone has other names than the file
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer may train it."""
        return True


def low_rank_modules(
    model: nn.Module,
) -> dict[str, LowRank]:
    """Name the modules that have been replaced, in network order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }


def remember_ranks(model: nn.Module) -> None:
    """Write each replaced module's rank into a Hugging Face model's config.

    With it, also a plain `save_pretrained`, or a checkpoint of Trainer, loads again. Of
    a wrapper (DataParallel, SentenceTransformer, a compiled model), into the config of
    each Hugging Face model it holds.
    """
    for inner in _outermost_pretrained(model):
        replaced = low_rank_modules(inner)
        if replaced:
            untie_replaced(inner)
            ranks = {name: module.rank for name, module in replaced.items()}
            inner.config.quantization_config = DroneConfig(ranks)


def _outermost_pretrained(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the Hugging Face models in a module, not those inside another of them."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost_pretrained(child)


def untie_replaced(model: nn.Module) -> None:
    """Forget the ties of weights of which one is no longer there.

    A decoder that shares the embedding's table is on its own once one of them is thin;
    transformers would still look for the dense weight.
    """
    if isinstance(model, PreTrainedModel):
        has = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = model.all_tied_weights_keys
        kept = {a: b for a, b in ties.items() if {a, b} <= has}
        model.all_tied_weights_keys = kept


def save(model: PreTrainedModel, folder: Path | str) -> None:
    """Write a compressed model as a Hugging Face folder, whole or not at all.

    `load(folder)` reads it back bit-equal, and so does, after `import drone`, plain
    `AutoModelForSequenceClassification.from_pretrained(folder)`.

    Args:
        model: from `compress`.
        folder: must not exist yet.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: no module of it is low-rank, or two modules share a tensor.
        FileExistsError: the folder exists.
    """
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise TypeError(f"{kind} is no Hugging Face model; save its state_dict().")
    if not low_rank_modules(model):
        raise ValueError("no module is low-rank; a dense model has save_pretrained().")
    _check_unshared(model)
    remember_ranks(model)
    with whole_folder(Path(folder)) as temporary, quiet():
        model.save_pretrained(temporary, max_shard_size="1TB")


def load(folder: Path | str) -> PreTrainedModel:
    """Read a folder written by `save`, in eval mode and the dtype it was saved in.

    Raises:
        FileNotFoundError: the folder has no config.json or no safetensors file.
        ValueError: not a compressed model, another format version, a damaged file, a
            missing or an extra tensor, or one of the wrong shape. The message names it.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder}: config.json and *.safetensors are needed.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    described = getattr(config, "quantization_config", None) or {}
    if described.get("quant_method") != METHOD:
        raise ValueError(f"{folder}: its config.json names no ranks; drone.save does.")
    (name,) = config.architectures
    kind: Any = getattr(transformers, name, None)
    if kind is None:  # registered with transformers, as the book's LSTM is
        kind = AutoModelForCausalLM
    with quiet():
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
    # An encoder taken out of a classifier may have no pooler; AutoModel's makes one.
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        own = {f"pooler.{name}" for name in pooler.state_dict()}
        if info["missing_keys"] == own:
            model.pooler, info["missing_keys"] = None, set()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            keys = ", ".join(sorted(map(str, info[problem])))
            raise ValueError(f"{folder}: {problem.replace('_', ' ')}: {keys}.")
    return model  # type: ignore[no-any-return]


def _names_in(model: nn.Module, ranks: dict[str, int]) -> dict[str, int]:
    """Rename the modules if the folder is read as its encoder alone, or with a head."""
    prefix = f"{model.base_model_prefix}."
    has = dict(model.named_modules())
    if not model.base_model_prefix or all(name in has for name in ranks):
        return ranks
    if any(name.startswith(prefix) for name in ranks):  # only the encoder is wanted
        kept = {n: k for n, k in ranks.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): rank for name, rank in kept.items()}
    return {prefix + name: rank for name, rank in ranks.items()}


def _skeleton(dense: nn.Module, name: str, rank: int) -> LowRank:
    """Return a low-rank module in place of a dense one, its weights not read yet."""
    if is_linear(dense):
        dense = as_linear(dense)
        weight = dense.weight
        left = weight.new_empty(dense.out_features, rank)
        right = weight.new_empty(rank, dense.in_features)
        bias = None if dense.bias is None else torch.empty_like(dense.bias)
        return LowRankLinear(left, right, bias)
    if isinstance(dense, nn.Embedding):
        table = dense.weight.new_empty(dense.num_embeddings, rank)
        right = dense.weight.new_empty(rank, dense.embedding_dim)
        return LowRankEmbedding(table, right, dense.padding_idx)
    try:
        query, _ = query_and_key(dense)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    rows = attention_heads(dense) * rank
    thin = [nn.Linear(query.in_features, rows).to(query.weight.dtype) for _ in range(2)]
    return LowRankSelfAttention.replacing(dense, *thin)


def _shapes(files: list[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor in safetensors files."""
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"{path}: damaged, or not safetensors ({error})."
            ) from error


def _check_tensors(model: nn.Module, names: dict[str, int], files: list[Path]) -> None:
    """Refuse a file without the low-rank modules' tensors.

    transformers would fill them with random numbers, and only warn.
    """
    # The file may name the modules with the encoder's prefix, or without.
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix): shape for key, shape in _shapes(files)}
    for name in names:
        for part, tensor in module_named(model, name).state_dict().items():
            key = f"{name}.{part}".removeprefix(prefix)
            if key not in stored:
                raise ValueError(f"{files[0].parent}: missing tensor {key}.")
            if stored[key] != tuple(tensor.shape):
                raise ValueError(
                    f"{files[0].parent}: {key} has shape {stored[key]}; "
                    f"{tuple(tensor.shape)} is what config.json's rank gives."
                )


def _check_unshared(model: PreTrainedModel) -> None:
    """Refuse two modules with one tensor: the file would hold only one of them."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(parameter.untyped_storage().data_ptr(), name)
        if first != name and name not in model.all_tied_weights_keys:
            raise ValueError(
                f"{name} shares its storage with {first}; clone one of them."
            )
