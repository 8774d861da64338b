"""What a compressed model says of itself: its ranks, and that it is not dense."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from drone.layers.attention import LowRankSelfAttention
from drone.layers.embedding import LowRankEmbedding
from drone.layers.linear import LowRankLinear
from drone.layers.lstm import LowRankLSTM

LowRank = LowRankLinear | LowRankSelfAttention | LowRankEmbedding | LowRankLSTM
Rank = int | dict[str, int]  # of a LowRankLSTM: {weight's name in nn.LSTM: rank}
# Format 1 had no markers, no SHA-256 and no LSTMs; it is read as it is.
FORMAT_VERSION = 2
METHOD = "drone"  # what config.json calls it


@register_quantization_config(METHOD)
class DroneConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model. Read by transformers itself.

    Attributes:
        ranks: {module name: rank}; of a LowRankLSTM {weight name: rank}.
        ties: {parameter: the one it shares its values with}.
        sha256: {file: digest} of the weights, and of the rest of config.json under
            "config.json"; empty if the folder was not written by `drone.save`.
    """

    def __init__(
        self,
        ranks: dict[str, Rank],
        format_version: int = FORMAT_VERSION,
        ties: dict[str, str] | None = None,
        sha256: dict[str, str] | None = None,
        strict: bool = False,
        **_: Any,
    ) -> None:
        """Take what stands in config.json, and check it.

        Args:
            ranks: as above.
            format_version: of the folder.
            ties: as above.
            sha256: as above.
            strict: set by `drone.load`, never written: every tensor must fit.

        Raises:
            ValueError: a version this library does not read, or a value of another
                kind. The message names it.
        """
        known = range(1, FORMAT_VERSION + 1)
        if type(format_version) is not int or format_version not in known:
            raise ValueError(
                f"the model was saved in format {format_version!r}; this version of "
                f"drone reads formats 1 to {FORMAT_VERSION}."
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an Enum
        self.format_version = FORMAT_VERSION
        self.ranks = _checked_ranks(ranks)
        self.ties = _checked_texts(ties, "ties")
        self.sha256 = _checked_texts(sha256, "sha256")
        self.strict = strict

    def to_dict(self) -> dict[str, Any]:
        """Return what is written: the empty parts are left out."""
        written = super().to_dict()
        del written["strict"]
        return {key: value for key, value in written.items() if value != {}}


def _checked_ranks(ranks: object) -> dict[str, Rank]:
    """Return the ranks if they are {name: whole number from 1}, else say which not."""
    if not isinstance(ranks, dict) or not ranks:
        raise ValueError(f"config.json: ranks are {ranks!r}; {{module: rank}} needed.")
    for name, rank in ranks.items():
        parts = rank if isinstance(rank, dict) else {"": rank}
        for part, value in parts.items():
            # True is an int to Python, and no rank
            if type(value) is not int or value < 1:
                where = f"{name}.{part}" if part else name
                raise ValueError(
                    f"config.json: the rank of {where} is {value!r}; a whole number "
                    "from 1 is needed."
                )
    return ranks


def _checked_texts(value: object, field: str) -> dict[str, str]:
    """Return a {text: text} field; a missing one is empty."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise ValueError(f"config.json: {field} is {value!r}; texts are needed.")
    return value


def low_rank_modules(model: nn.Module) -> dict[str, LowRank]:
    """Name the modules that have been replaced, in network order.

    A module with two names is there twice; the parts of a LowRankLSTM are not.
    """
    found: dict[str, LowRank] = {}
    lstms: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankLSTM):
            lstms.append(f"{name}.")
        if isinstance(module, LowRank) and not name.startswith(tuple(lstms)):
            found[name] = module
    return found


def rank_of(module: LowRank) -> Rank:
    """Return a module's rank; of a LowRankLSTM, that of each thin weight."""
    if not isinstance(module, LowRankLSTM):
        return module.rank
    return {
        f"weight_{kind}_l{number}": part.rank
        for number, layer in enumerate(module.layers)
        for kind, part in (("ih", layer.input), ("hh", layer.recurrent))
        if isinstance(part, LowRankLinear)
    }


def remember_ranks(model: nn.Module) -> None:
    """Write the ranks into the config of each Hugging Face model in `model`.

    With them a plain `save_pretrained`, or a checkpoint of Trainer, loads again, also
    of a model inside a wrapper. Its state_dict gets markers: see `_mark`.
    """
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    # The outermost comes last: an encoder inside a classifier has the same config.
    for each in reversed(inner):
        replaced = low_rank_modules(each)
        if replaced:
            ties = _ties(each, replaced)
            untie_replaced(each)
            tie(each, ties)
            ranks = {name: rank_of(module) for name, module in replaced.items()}
            each.config.quantization_config = DroneConfig(ranks, ties=ties)
            # transformers would write the tensors' names of its older versions, and
            # split or join those of dense layers on the way; [] says: as they are.
            setattr(each, "_weight_conversions", [])  # noqa: B010
            if _mark not in each._state_dict_hooks.values():
                each.register_state_dict_post_hook(_mark)
                each.register_load_state_dict_pre_hook(_unmark)


def untie_replaced(model: PreTrainedModel) -> None:
    """Forget the ties of dense weights that are no longer there.

    A decoder that shares the embedding's table is on its own once one of them is thin;
    transformers would still look for the dense weight.
    """
    has = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.all_tied_weights_keys
    model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= has}
    for module in model.modules():
        declared = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(declared, dict):
            gone = list(markers(module))
            module._tied_weights_keys = {
                pattern: source
                for pattern, source in declared.items()
                if not any(re.search(p, g) for p in (pattern, source) for g in gone)
            }


def tie(model: PreTrainedModel, ties: dict[str, str]) -> None:
    """Tell transformers of parameters that share their values: it keeps one of them."""
    model.all_tied_weights_keys = model.all_tied_weights_keys | ties
    if ties:
        declared = getattr(model, "_tied_weights_keys", None) or {}
        model._tied_weights_keys = declared | {re.escape(a): b for a, b in ties.items()}


def _ties(model: nn.Module, replaced: Mapping[str, LowRank]) -> dict[str, str]:
    """{name: first name} of each parameter of a low-rank module that has two names."""
    first: dict[int, str] = {}
    ties = {}
    inside = tuple(f"{name}." for name in replaced)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and name.startswith(inside):
            ties[name] = known
    return ties


def markers(model: nn.Module) -> Iterator[str]:
    """Yield the names of dense tensors that the low-rank modules replaced."""
    for name, module in low_rank_modules(model).items():
        if isinstance(module, LowRankLSTM):
            yield f"{name}.weight_ih_l0"
        elif not isinstance(module, LowRankSelfAttention):  # query and key are there
            yield f"{name}.weight"


def _mark(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put one number under the name of each dense weight that was replaced.

    Read without `import drone`, transformers builds the dense layer, finds no weight
    for it, draws one at random and only logs that. Another shape it refuses.
    """
    own = dict(low_rank_modules(model))
    for key in markers(model):
        tensor: Tensor = next(own[key.rpartition(".")[0]].parameters())
        state[prefix + key] = tensor.detach().new_zeros(1)


def _unmark(
    model: nn.Module, state: dict[str, Any], prefix: str, *_others: Any
) -> None:
    """Take the markers out again before the state is read into a model."""
    for key in markers(model):
        if getattr(state.get(prefix + key), "shape", None) == (1,):
            del state[prefix + key]
