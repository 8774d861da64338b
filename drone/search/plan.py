"""The ranks a search chose, what they cost and what they cost to find."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from drone.model.adapters import swap
from drone.model.calibrate import calibrate
from drone.model.compress import compress
from drone.model.storage import remember_ranks
from drone.model.walk import input_name
from drone.search.costs import Costs

FORMAT_VERSION = 1

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RankPlan:
    """The ranks a search chose, what they cost and what they cost to find.

    Attributes:
        method: one of `METHODS`.
        target: one of `TARGETS`.
        budget: as given.
        ranks: {module name: rank}; a searched module that is not here stays dense.
        loss: of the compressed model on the search batches, evaluated afresh.
        dense_loss: of the dense model on the same batches.
        costs: of the modules at the ranks that were candidates, with their times.
        trace: one entry a trial, as made: `module`, `rank`, `loss`, `allowed`, `fits`.
            The dense model's has no module and no rank; a rival's trial of a whole
            model has no module, and as rank its place on the path.
        trials: losses evaluated, those read back from an interrupted search included.
        layer_forwards: passes of all batches through one encoder layer, so made.
        seconds: the search took, factorizations included. Of an interrupted search,
            both count its trials, and the rest of the work once.
    """

    method: str
    target: str
    budget: float
    ranks: dict[str, int]
    loss: float
    dense_loss: float
    costs: Costs
    trace: list[dict[str, Any]]
    trials: int
    layer_forwards: int
    seconds: float
    # The low-rank modules themselves; a plan read from a file has none.
    modules: dict[str, nn.Module] = field(
        default_factory=dict, repr=False, compare=False
    )

    def apply(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None
    ) -> nn.Module:
        """Return a copy of the model with the plan's ranks.

        Args:
            model: the one searched; it is left as it was.
            batches: collect the inputs of each module from them anew, as the search
                did; needed for a plan read from JSON. None: the very modules the
                search found.

        Raises:
            ValueError: the plan was read from JSON and no batches are given; and what
                `compress` raises.
        """
        if batches is not None:
            if self.method == "drone":
                return compress(model, self.ranks, batches=batches, sequential=True)
            sources = [input_name(model.get_submodule(n), n) for n in self.ranks]
            return compress(model, self.ranks, calibrate(model, batches, sources))
        if not self.modules and self.ranks:
            raise ValueError(
                "a plan read from JSON has ranks and no weights; give apply the "
                "batches to collect inputs from."
            )
        small = copy.deepcopy(model)
        for name, module in self.modules.items():
            swap(small, name, copy.deepcopy(module))
        for name, module in small.named_modules():  # the search ran in eval mode
            module.training = model.get_submodule(name).training
        remember_ranks(small)
        return small

    @property
    def predicted_speedup(self) -> float:
        """The dense model's time over the compressed one's, from measured modules."""
        return self.costs.speedup(self.ranks)

    @property
    def weights_share(self) -> float:
        """What is left of the searched modules' weights, and multiply-adds a token."""
        return self.costs.weights(self.ranks) / self.costs.weights({})

    def table(self) -> "pd.DataFrame":
        """Return the trace as a table, one row a trial."""
        import pandas as pd  # half a second: only who asks for a table pays it

        return pd.DataFrame(self.trace)

    def to_json(self) -> str:
        """Write everything but the modules as text; `from_json` reads it back."""
        fields = {k: v for k, v in vars(self).items() if k != "modules"}
        fields |= {"drone_plan": FORMAT_VERSION, "costs": self.costs.to_json()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no plan, or one of another format.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("drone_plan")
            if version == FORMAT_VERSION:
                fields["costs"] = Costs.from_json(fields["costs"])
                return cls(**fields)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no plan written by to_json ({error!r}).") from error
        raise ValueError(
            f"a plan of format {version}; {FORMAT_VERSION} is what this version of "
            "drone reads."
        )
