"""A compressed model as an ordinary Hugging Face folder, safetensors and config."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from drone.files import whole_folder
from drone.model import own as _own  # noqa: F401  # registers the LSTM
from drone.model.loader import DroneLoader
from drone.model.ranks import (
    METHOD,
    DroneConfig,
    low_rank_modules,
    remember_ranks,
    untie_replaced,
)
from drone.model.weight_files import (
    CONFIG,
    Header,
    digests,
    headers,
    read_json,
    weight_files,
)
from drone.progress import quiet

__all__ = [
    "DroneConfig",
    "DroneLoader",
    "load",
    "low_rank_modules",
    "remember_ranks",
    "save",
    "untie_replaced",
]

# Fields with which a config points to other files, code or kernels than the folder's.
FOREIGN = ("transformers_weights", "fusion_config", "base_model_name_or_path")
# Fields that say how many layers are built. Others with "layer" in their name are the
# width of a layer's input, the number of one layer, or a bound far above any.
DEPTHS = re.compile(
    r"(?:[a-z]+_)*(?:n_layers?|encoder_layers|decoder_layers|"
    r"num_(?:(?:hidden|encoder|decoder|conv|adapter|feat_extract)_)?layers)"
)
# What a config with impossible numbers makes of a model's constructor.
UNFIT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def save(model: PreTrainedModel, folder: Path | str) -> None:
    """Write a compressed model as a Hugging Face folder, whole or not at all.

    `load(folder)` reads it back bit-equal, and so does, after `import drone`, plain
    `AutoModelForSequenceClassification.from_pretrained(folder)`. Without `import drone`
    that raises a size mismatch; with `ignore_mismatched_sizes=True` it does not, and
    every layer that was replaced comes back random: do not pass it to such a folder.

    Args:
        model: from `compress`, a Hugging Face model and not what wraps one.
        folder: new or empty.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: no module of it is low-rank, two modules share a tensor, or a
            parameter has NaN or Inf. The message names it.
        FileExistsError: the folder has something in it, or is a file.

    >>> import tempfile, drone
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    >>> model = BertModel(BertConfig(vocab_size=20, num_hidden_layers=1, **sizes))
    >>> small = drone.compress(model, {"encoder.layer.0.output.dense": 3})
    >>> folder = tempfile.mkdtemp()
    >>> drone.save(small, folder)
    >>> drone.load(folder).encoder.layer[0].output.dense.rank
    3
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(_no_model(model))
    if not low_rank_modules(model):
        raise ValueError("no module is low-rank; a dense model has save_pretrained().")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} has NaN or Inf; it is not saved.")
    remember_ranks(model)
    _check_unshared(model)
    with whole_folder(Path(folder)) as temporary, quiet():
        model.save_pretrained(temporary, max_shard_size="1TB")
        config = read_json(temporary / CONFIG)
        written = digests(temporary, weight_files(temporary))
        config["quantization_config"]["sha256"] = written
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def load(
    folder: Path | str, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Read a folder written by `save`, in eval mode and the dtype it was saved in.

    Nothing of the folder is run, nothing is asked and no network is used. Weights and
    config.json are compared with their digests; labels may be renamed.

    Args:
        folder: written by `save`, by a compressed model's `save_pretrained` (one file
            or shards), or as a checkpoint of Trainer.
        cls: the model's class; None: the one config.json names, which has to be
            transformers' own or imported already.

    Raises:
        FileNotFoundError: the folder has no config.json or no safetensors file.
        ValueError: not a compressed model, another format version, a damaged file, a
            missing or an extra tensor, or one of the wrong shape or dtype, a NaN. The
            message names it.
        ImportError: the model is an LSTM of the book and a package of its is missing.
    """
    if cls is not None and _is_abstract(cls):
        raise ValueError(
            f"cls is {cls.__name__}, which has no forward; give the class."
        )
    folder = Path(folder)
    files = weight_files(folder)
    written = read_json(folder / CONFIG)
    described = written.get("quantization_config")
    if not isinstance(described, dict) or described.get("quant_method") != METHOD:
        raise ValueError(f"{folder}: its config.json names no ranks; drone.save does.")
    DroneConfig(**{"ranks": None, **described})  # refused before a model is built
    for field in FOREIGN:
        if written.get(field) is not None:
            raise ValueError(f"{folder}: config.json's {field} is never followed.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: has an adapter; merge it, and save anew.")
    _check_counts(folder, written, headers(files))
    config = _config(folder, written, cls)
    config.quantization_config = {**described, "strict": True}
    kind: Any = cls or _class_named(folder, written.get("architectures"), config)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except UNFIT as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise  # said by `DroneLoader`
        raise ValueError(
            f"{folder}: config.json does not fit {kind.__name__}: {_short(error)}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            keys = ", ".join(sorted(map(str, info[problem])))
            raise ValueError(f"{folder}: {problem.replace('_', ' ')}: {keys}.")
    return model  # type: ignore[no-any-return]


def _config(
    folder: Path, written: Mapping[str, Any], cls: type[PreTrainedModel] | None
) -> PreTrainedConfig:
    """Read config.json as its class, which is never the folder's own code."""
    own = getattr(cls, "config_class", None)
    try:
        if own is not None:
            return own.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]
        return AutoConfig.from_pretrained(  # type: ignore[no-any-return]
            folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:  # said by `UnreadLSTMConfig`
        raise ImportError(f"{folder}: {error}") from error
    except UNFIT as error:
        raise ValueError(
            f"{folder}: config.json is not one that transformers knows "
            f"({_short(error)}). The folder's own code is never run: give the class, "
            "load(folder, cls=MyModel)."
        ) from error


def _short(error: Exception) -> str:
    """Return the first sentence of an error, at most two lines long."""
    words = " ".join(str(error).split()).partition(". ")[0]
    return words[:160].removesuffix(".")


def _class_named(
    folder: Path, names: object, config: PreTrainedConfig
) -> type[PreTrainedModel]:
    """Find the model's class: transformers' own, or one that is imported already."""
    hint = "Give the class, load(folder, cls=MyModel)."
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(
            f"{folder}: config.json's architectures are {names!r}; a list with one "
            f"class's name is needed. {hint}"
        )
    (name,) = names
    found: list[Any] = (
        [getattr(transformers, name, None)] if name.isidentifier() else []
    )
    if found != [None]:
        found = [c for c in found if isinstance(c, type)]
    else:
        found = [c for c in _subclasses(PreTrainedModel) if c.__name__ == name]
    fitting: list[type[PreTrainedModel]] = [
        c
        for c in found
        if issubclass(c, PreTrainedModel)
        and not _is_abstract(c)
        and isinstance(config, c.config_class or PreTrainedConfig)
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{folder}: config.json's architectures name {name}, which is no model "
            f"class for a {config.model_type} that is known here. {hint}"
        )
    return fitting[0]


def _is_abstract(kind: type) -> bool:
    """Whether a class is a base of models and cannot run itself.

    One that is built makes transformers take every later class for one with experts.
    """
    return getattr(kind, "forward", None) is nn.Module.forward


def _subclasses(kind: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    """Yield all classes derived from one, that are imported."""
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _check_counts(
    folder: Path, written: Mapping[str, Any], stored: Mapping[str, Header]
) -> None:
    """Refuse more layers than there are tensors, or more labels than numbers.

    Such a model would fill the memory while it is built, before a shape is compared.
    """
    most = max((max(h.shape, default=1) for h in stored.values()), default=1)
    for field, value in written.items():
        if isinstance(value, dict) and field.endswith("_config"):
            _check_counts(folder, value, stored)
        layers = DEPTHS.fullmatch(field) is not None and not isinstance(value, bool)
        allowed = len(stored) if layers else most
        counted = layers or field == "num_labels"
        if counted and isinstance(value, int | float) and value > allowed:
            raise ValueError(
                f"{folder}: config.json's {field} is {value}; the weights have room "
                f"for {allowed}."
            )


def _no_model(given: object) -> str:
    """Say what to save instead of this."""
    kind = type(given).__name__
    if isinstance(given, Mapping):
        return f"a {kind} of tensors is no model; give the model itself."
    if isinstance(given, nn.Module):
        for name, module in given.named_modules():
            if isinstance(module, PreTrainedModel):
                return (
                    f"{kind} wraps a {type(module).__name__}; save that one: "
                    f"save(model.{name}, folder)."
                )
        return f"{kind} is no Hugging Face model; save its state_dict()."
    return f"{kind} is no Hugging Face model; save(model, folder) takes one first."


def _check_unshared(model: PreTrainedModel) -> None:
    """Refuse two modules with one tensor: the file would hold only one of them."""
    seen: dict[int, tuple[str, Any]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = parameter.untyped_storage().data_ptr()
        first, other = seen.setdefault(place, (name, parameter))
        tied = {first, name} & model.all_tied_weights_keys.keys()
        if first != name and not (tied and parameter is other):
            raise ValueError(
                f"{name} shares its storage with {first}; clone one of them."
            )
