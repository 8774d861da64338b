"""How transformers builds a compressed model while it reads one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from drone.layers.attention import LowRankSelfAttention, attention_heads, query_and_key
from drone.layers.embedding import LowRankEmbedding
from drone.layers.linear import LowRankLinear
from drone.layers.lstm import LowRankLSTM, LSTMLayer
from drone.math.factorize import check_rank
from drone.model.adapters import module_named
from drone.model.ranks import (
    METHOD,
    DroneConfig,
    LowRank,
    Rank,
    low_rank_modules,
    markers,
    remember_ranks,
    tie,
    untie_replaced,
)
from drone.model.weight_files import (
    CONFIG,
    Header,
    check_digests,
    check_inside,
    headers,
)

ALIGNED = 64  # bytes: where PyTorch lets the memory of a tensor begin
# A tensor that several stored ones are made into has no shape before it is made.
Stored = dict[str, Header | None]


@register_quantizer(METHOD)
class DroneLoader(HfQuantizer):
    """Lets `from_pretrained` build the thin modules before it reads the weights.

    transformers' hook for quantized models is the one place where a library may
    replace modules while a model loads; nothing here is quantized.
    """

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> nn.Module:
        described = self.quantization_config
        assert isinstance(described, DroneConfig)  # registered for it
        files = [Path(file) for file in checkpoint_files or []]
        folder = files[0].parent if files else Path()
        origin = model.config.name_or_path
        assert origin is not None  # from_pretrained has written it there
        if Path(origin).is_dir():  # not a name on the hub
            folder = _folder_in(Path(origin), files)
        check_inside(folder, files)
        check_digests(folder, files, described.sha256)
        found = headers(files)
        names = _names_in(model, described.ranks, _renamed(model, found))
        dense = {name: model.get_submodule(name) for name in names}
        made: dict[nn.Module, LowRank] = {}  # a module with two names is one again
        # Blocks first: they take over the other projections, by the same names.
        for name in sorted(names, key=lambda n: isinstance(dense[n], nn.Linear)):
            old = model.get_submodule(name)
            if old not in made:
                made[old] = _skeleton(old, name, names[name])
            model.set_submodule(name, made[old])
        untie_replaced(model)
        has = model.state_dict()
        ties = _ties_in(model, described.ties, has)
        tie(model, ties)
        stored = _renamed(model, found)
        _check_low_rank(folder, model, stored)
        if described.strict:
            _check_all(folder, model, stored)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(rf"(^|\.){re.escape(key)}$" for key in markers(model)),
        }
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> nn.Module:
        # It trains, casts and moves like any model: only its config remembers.
        del model.hf_quantizer, model.quantization_method
        setattr(model, "is_quantized", False)  # noqa: B010
        del model._keys_to_ignore_on_load_unexpected  # the class's own holds again
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":  # it stays on the disk
                continue
            if not parameter.isfinite().all():
                raise ValueError(f"{model.config.name_or_path}: {name} has NaN or Inf.")
            # A file puts tensors where it likes. Products round otherwise there: from
            # ordinary memory the outputs are bit-equal to those of the saved model.
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNED:
                parameter.data = parameter.data.clone()
        remember_ranks(model)  # an encoder read alone has other names than the file
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer may train it."""
        return True


def _folder_in(origin: Path, files: list[Path]) -> Path:
    """Return where weights have to lie: `subfolder=` names a model's folder inside one.

    It has its config with it; an index of shards that points below its own has not.
    """
    folder = files[0].parent if files else origin
    inside = folder.is_relative_to(origin) and ".." not in folder.parts
    return folder if inside and (folder / CONFIG).is_file() else origin


def _renamed(model: PreTrainedModel, found: Mapping[str, Header]) -> Stored:
    """Call stored tensors as the model does, by transformers' own rules.

    Its older versions had other names for the parts of many families, and an encoder
    may be read alone or below a head.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, has = model.base_model_prefix, model.state_dict()
    stored: Stored = {}
    for key, header in found.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, has)
        if name not in has and key in has:  # a new name that an old rule spoilt
            name, pattern = rename_source_key(key, [], [], prefix, has)
        if pattern is None:
            stored[name] = header
            continue
        for rule in converters:
            if pattern in rule.source_patterns:
                first, *others = rule.target_patterns
                stored |= {name.replace(first, each): None for each in (first, *others)}
    return stored


def _names_in(
    model: PreTrainedModel, ranks: Mapping[str, Rank], stored: Stored
) -> dict[str, Rank]:
    """Rename the modules if the folder is read as its encoder alone, or with a head.

    Raises:
        ValueError: neither the model nor the weights know a name.
    """
    prefix = f"{model.base_model_prefix}."
    has = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, rank in ranks.items():
        for own in (name, name.removeprefix(prefix), prefix + name):
            if own in has:
                found[own] = rank
                break
        else:  # of a part that is not wanted now, or misspelt
            inside = (f"{name}.", f"{name.removeprefix(prefix)}.")
            if not any(key.startswith(inside) for key in stored):
                module_named(model, name)  # says which names there are
    return found


def _ties_in(
    model: PreTrainedModel, ties: Mapping[str, str], has: Mapping[str, Tensor]
) -> dict[str, str]:
    """Rename tied parameters as `_names_in` does; both have to be there."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for pair in ties.items():
        for a, b in (
            pair,
            [name.removeprefix(prefix) for name in pair],
            [prefix + name for name in pair],
        ):
            if a in has and b in has:
                found[a] = b
                break
    return found


def _skeleton(dense: nn.Module, name: str, rank: Rank) -> LowRank:
    """Return a low-rank module in place of a dense one, its weights not read yet.

    Raises:
        ValueError: the module cannot have this rank. The message names it.
    """
    if isinstance(dense, nn.LSTM):
        return _thin_lstm(dense, name, rank)
    if isinstance(rank, dict):
        kind = type(dense).__name__
        raise ValueError(f"{name} is a {kind} and has ranks of an LSTM's weights.")
    if isinstance(dense, nn.Linear | Conv1D):
        weight = dense.weight
        shape = weight.shape if isinstance(dense, nn.Linear) else weight.shape[::-1]
        check_rank(rank, min(shape), where=name)
        left, right = weight.new_empty(shape[0], rank), weight.new_empty(rank, shape[1])
        bias = None if dense.bias is None else torch.empty_like(dense.bias)
        return LowRankLinear(left, right, bias)
    if isinstance(dense, nn.Embedding):
        check_rank(rank, dense.embedding_dim, where=name)
        table = dense.weight.new_empty(dense.num_embeddings, rank)
        right = dense.weight.new_empty(rank, dense.embedding_dim)
        return LowRankEmbedding(table, right, dense.padding_idx)
    try:
        query, _ = query_and_key(dense)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    heads = attention_heads(dense)
    check_rank(rank, query.out_features // heads, where=name)
    rows, like = heads * rank, query.weight
    thin = [
        nn.Linear(query.in_features, rows, device=like.device, dtype=like.dtype)
        for _ in range(2)
    ]
    return LowRankSelfAttention.replacing(dense, *thin)


def _thin_lstm(lstm: nn.LSTM, name: str, ranks: Rank) -> LowRankLSTM:
    """Return a LowRankLSTM in place of an `nn.LSTM`, its weights not read yet."""
    if not isinstance(ranks, dict):
        raise ValueError(f"{name} is an LSTM; {{weight: rank}} is needed, not {ranks}.")
    hidden, like = lstm.hidden_size, lstm.weight_ih_l0
    assert isinstance(like, Tensor)  # every nn.LSTM has a first layer
    layers = []
    for number in range(lstm.num_layers):
        into = hidden if number else lstm.input_size
        with torch.random.fork_rng():  # what is drawn is overwritten
            layer = LSTMLayer(into, hidden, lstm.dropout if number else 0.0).to(like)
        for kind, part in (("ih", "input"), ("hh", "recurrent")):
            weight = f"weight_{kind}_l{number}"
            if weight in ranks:
                new = _skeleton(getattr(layer, part), f"{name}.{weight}", ranks[weight])
                setattr(layer, part, new)
        layers.append(layer)
    known = [n for n, _ in lstm.named_parameters() if n.startswith("weight")]
    for weight in ranks.keys() - set(known):
        raise ValueError(f"{name} has no {weight}; there are {', '.join(known)}.")
    return LowRankLSTM(layers, lstm.batch_first)


def _check_low_rank(folder: Path, model: PreTrainedModel, stored: Stored) -> None:
    """Refuse weights without the low-rank modules' tensors.

    transformers would fill them with random numbers, and only warn.
    """
    for key in markers(model):
        header = stored.get(key)
        if header is not None and header.shape != (1,):
            raise ValueError(
                f"{folder}: {key.rpartition('.')[0]} has a rank in config.json, and a "
                f"dense weight of shape {header.shape}; one of them is wrong."
            )
    ties = model.all_tied_weights_keys
    for name, module in low_rank_modules(model).items():
        for part, tensor in module.state_dict().items():
            key = f"{name}.{part}"
            if key not in stored and ties.get(key) not in stored:
                raise ValueError(f"{folder}: missing tensor {key}.")
            _check_one(folder, key, stored.get(key), tensor)


def _check_all(folder: Path, model: PreTrainedModel, stored: Stored) -> None:
    """Refuse weights that are not exactly the model's, before memory is taken for it.

    An encoder taken out of a classifier may have no pooler, though a new one is made.
    """
    has = model.state_dict()
    pooler = [key for key in has if key.startswith("pooler.")]
    if pooler and not stored.keys() & set(pooler):
        model.register_module("pooler", None)
        has = model.state_dict()
    for key, tensor in has.items():
        _check_one(folder, key, stored.get(key), tensor)
    ties = model.all_tied_weights_keys
    tied = {key for pair in ties.items() if stored.keys() & set(pair) for key in pair}
    missing = has.keys() - stored.keys() - tied
    extra = stored.keys() - has.keys() - set(markers(model))
    for problem, keys in (("missing", missing), ("unexpected", extra)):
        ignored = getattr(model, f"_keys_to_ignore_on_load_{problem}") or ()
        left = [key for key in keys if not any(re.search(p, key) for p in ignored)]
        if left:
            raise ValueError(f"{folder}: {problem} keys: {', '.join(sorted(left))}.")


def _check_one(folder: Path, key: str, header: Header | None, tensor: Tensor) -> None:
    """Refuse a stored tensor of another shape, or of another kind of numbers."""
    if header is None:
        return
    if header.shape != tuple(tensor.shape):
        raise ValueError(
            f"{folder}: {key} has shape {header.shape}; {tuple(tensor.shape)} is what "
            "config.json gives."
        )
    if header.numbers != tensor.is_floating_point():
        raise ValueError(
            f"{folder}: {key} is {header.dtype}; {tensor.dtype} is what it replaces."
        )
