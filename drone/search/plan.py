"""The ranks a search chose, what they cost and what they cost to find."""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from drone.callers import warn
from drone.files import tensors_sha256
from drone.layers.linear import moved
from drone.model.calibrate import alone, calibrate
from drone.model.cautions import NothingReplacedWarning
from drone.model.compress import broken_ties, compress, put_module, settle
from drone.model.walk import input_name
from drone.search.costs import Costs
from drone.search.goal import Goal

FORMAT_VERSION = 2
KINDS_SHOWN = 12  # lines of a plan's repr that tell of kinds of modules

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class RankPlan:
    """The ranks a search chose, what they cost and what they cost to find.

    Attributes:
        method: one of `METHODS`.
        goal: what was asked for.
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
        model_sha256: of the weights that were searched; "" in a plan of format 1.
        layers: as `search_ranks` was given them.
    """

    method: str
    goal: Goal
    ranks: dict[str, int]
    loss: float
    dense_loss: float
    costs: Costs
    trace: list[dict[str, Any]]
    trials: int
    layer_forwards: int
    seconds: float
    model_sha256: str = ""
    layers: list[str] | None = None
    # The low-rank modules themselves; a plan read from a file has none.
    modules: dict[str, nn.Module] = field(default_factory=dict, compare=False)

    def apply(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None
    ) -> nn.Module:
        """Return a copy of the model with the plan's ranks, on the model's device.

        Args:
            model: the one searched; it is left as it was. With `batches` any model
                whose modules have the same names may take over the ranks.
            batches: collect the inputs of each module from them anew, as the search
                did; needed for a plan read from JSON. None: the very modules the
                search found.

        Raises:
            ValueError: the plan was read from JSON and no batches are given; without
                batches, a model whose weights are not those that were searched; and
                what `compress` raises.

        Warns:
            BrokenTieWarning, NothingReplacedWarning: as `compress`; with batches all
                that it warns of.
        """
        if batches is not None:
            if self.method == "drone":
                return compress(
                    model,
                    self.ranks,
                    batches=batches,
                    sequential=True,
                    layers=self.layers,
                )
            sources = [input_name(model.get_submodule(n), n) for n in self.ranks]
            return compress(model, self.ranks, calibrate(model, batches, sources))
        if not self.modules and self.ranks:
            raise ValueError(
                "a plan read from JSON has ranks and no weights; give apply the "
                "batches to collect inputs from."
            )
        if self.model_sha256 not in ("", weights_sha256(model)):
            raise ValueError(
                "this model's weights are not those that were searched, and the plan's "
                "modules hold the searched ones. Give apply batches to compress this "
                "model at the plan's ranks, or search it."
            )
        ties = broken_ties(model, self.ranks)
        with alone(model):  # no hooks nor modes of another thread's calibration
            small = copy.deepcopy(model)
        for name, module in self.modules.items():
            # The search may have run elsewhere, or in another dtype.
            weight = next(model.get_submodule(name).parameters())
            put_module(small, name, moved(copy.deepcopy(module), weight))
        settle(model, small, ties)
        if not self.ranks:
            warn_of_an_empty_plan(len(self.costs.modules))
        return small

    @property
    def target(self) -> str:
        """What the goal is about, in the old spelling of `search_ranks`."""
        if self.goal.loss_increase is not None:
            return "loss"
        return "latency" if self.goal.speedup is not None else "parameters"

    @property
    def budget(self) -> float:
        """The number that goes with `target`: allowed increase, or share to keep."""
        if self.goal.speedup is not None:
            return 1 / self.goal.speedup
        (number,) = (n for n in asdict(self.goal).values() if n is not None)
        return float(number)

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

    def __repr__(self) -> str:
        """Say in a few lines what was chosen; `ranks` and `table()` have it all."""
        growth = self.loss / self.dense_loss - 1 if self.dense_loss else float("nan")
        lines = [
            f"RankPlan by {self.method}: {self.goal}",
            f"  {len(self.ranks)} of {len(self.costs.modules)} modules low-rank, "
            f"{self.weights_share:.1%} of their weights kept",
            f"  speed-up {self.predicted_speedup:.3g} predicted, loss {self.loss:.6g} "
            f"(dense {self.dense_loss:.6g}, {growth:+.2%})",
            f"  {self.trials:,} trials, {self.layer_forwards:,} layer passes, "
            f"{self.seconds:.3g} s",
        ]
        kinds: dict[str, list[int | None]] = {}
        for name in self.costs.modules:
            kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            kinds.setdefault(kind, []).append(self.ranks.get(name))
        for kind, ranks in list(kinds.items())[:KINDS_SHOWN]:
            thin = sorted(rank for rank in ranks if rank is not None)
            span = f"ranks {thin[0]} to {thin[-1]}" if thin else "dense"
            if 0 < len(thin) < len(ranks):
                span += f", {len(ranks) - len(thin)} dense"
            shown = kind if len(kind) <= 40 else f"…{kind[-39:]}"
            lines.append(f"  {shown:40} {span}")
        if len(kinds) > KINDS_SHOWN:
            lines.append(f"  and {len(kinds) - KINDS_SHOWN} more kinds of modules")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Write everything but the modules as text; `from_json` reads it back."""
        fields = {k: v for k, v in vars(self).items() if k != "modules"}
        fields |= {"drone_plan": FORMAT_VERSION, "costs": self.costs.to_json()}
        return json.dumps(fields | {"goal": asdict(self.goal)})

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """Read what `to_json` wrote, in this format or in the one before it.

        Raises:
            ValueError: the text is no plan, or one of another format.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("drone_plan")
            if version in (1, FORMAT_VERSION):
                fields["costs"] = Costs.from_json(fields["costs"])
                if version == 1:
                    old = Goal.old(fields.pop("budget"), fields.pop("target"))
                    return cls(goal=old, **fields)
                return cls(**fields | {"goal": Goal(**fields["goal"])})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no plan written by to_json ({error!r}).") from error
        raise ValueError(
            f"a plan of format {version}; 1 and {FORMAT_VERSION} are what this version "
            "of drone reads."
        )


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers of a model, wherever they are."""
    state = model.state_dict().items()
    return tensors_sha256({k: v for k, v in state if isinstance(v, Tensor)})


def warn_of_an_empty_plan(searched: int) -> None:
    """Say that a search replaced nothing."""
    warn(
        f"the search left all {searched} modules dense: the plan is empty. Ask for "
        "less; plan.table() has its trials.",
        NothingReplacedWarning,
    )
