"""The ways to make an encoder faster that chapter 7 compares, each with its own knob.

Every method turns its knob until the predicted speed-up is the one asked for, with the
same calibration rows; points are compared at equal speed.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone.lab.depth import alternate_layers, first_layers, only_layers
from drone.lab.knapsack import least_loss
from drone.lab.ladder import aim
from drone.lab.speeds import Speeds, fill
from drone.lab.temper import tempered
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization
from drone.model.adapters import encoder_layers, encoder_linears
from drone.model.calibrate import calibrate, frozen
from drone.model.compress import compress, factorize_modules, replace_module
from drone.model.walk import Walk, input_name, mean_loss
from drone.search.algorithm2 import search_ranks
from drone.search.costs import Costs, searchable
from drone.search.rivals import relative_errors

# Name → what it does and what its knob is.
METHODS = {
    "first-layers": "dense, the first layers only; knob: how many",
    "alternate-layers": "dense, layers evenly spread; knob: how many",
    "svd-fraction": "plain SVD, every Linear at one share; knob: the share",
    "svd-latency": "plain SVD, ranks by least loss within the time; attention too",
    "drone-fraction": "data-aware in order, as svd-fraction",
    "drone-latency": "data-aware in order, ranks as svd-latency",
    "drone-algorithm2": "data-aware in order, Algorithm 2; knob: its budget",
    "drone-algorithm2-fitted": "the same, on rows that the model was fitted to",
}
FITTED = "-fitted"  # calibrated and searched on as many of the fit rows
# How near Algorithm 2 comes to a speed. A plan jumps as its budget grows, so that the
# last two parts in a hundred cost as many walks as all before them.
WITHIN = 0.03
MEASURED = 3  # ranks of each module whose loss is measured; between them interpolated

_Found = Mapping[str, Factorization | AttentionFactorization]


@dataclass
class Methods:
    """Finds and builds compressed versions of one fine-tuned model.

    Attributes:
        model: dense, in eval mode; it is left as it was.
        batches: calibration rows, with `labels` and `attention_mask`; they calibrate
            and judge ranks.
        speeds: of the model's shapes on the reference processor.
    """

    model: PreTrainedModel
    batches: Sequence[Mapping[str, Tensor]]
    speeds: Speeds
    # plain SVDs, the same for every method and speed
    svds: dict[str, Factorization | AttentionFactorization] = field(
        default_factory=dict, repr=False
    )
    # of `svd` and `drone`, for every speed: costs, what each module alone adds, and the
    # seconds that this took
    alone: dict[str, tuple[Costs, dict[str, np.ndarray], float]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def _judged(self) -> tuple[PreTrainedModel, float]:
        """The model whose loss the searches look at, and its temperature."""
        return tempered(self.model, self.batches)

    def find(self, method: str, speedup: float, start: float = 0.15) -> dict[str, Any]:
        """Turn a method's knob until it meets the predicted speed-up.

        Args:
            method: one of `METHODS`.
            speedup: above 1.
            start: the budget that Algorithm 2 tries first.

        Returns:
            What `build` needs, `ranks` or `layers`, and what is known of it: the
            predicted `speedup`, `weights_share` of the encoder layers' Linears, `loss`
            that Algorithm 2 ended at, `knobs` tried with what they gave, the
            `temperature` of the model whose loss was looked at, `seconds`; of a latency
            search `measured_seconds`, of the part that serves every speed, whichever
            speed came first.

        Raises:
            ValueError: no such method, or a speed that its smallest ranks do not reach.
        """
        started = time.perf_counter()
        if method.endswith("-layers"):
            plan = self._depth(method, speedup)
        elif method.endswith("-fraction"):
            plan = self._fraction(speedup)
        elif method.endswith("-latency"):
            plan = self._latency(method, speedup)
        elif method.removesuffix(FITTED) == "drone-algorithm2":
            plan = self._algorithm_2(speedup, start)
        else:
            raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}.")
        return plan | {"seconds": time.perf_counter() - started}

    def build(self, method: str, plan: Mapping[str, Any]) -> PreTrainedModel:
        """Return the compressed copy that a plan of `find` describes, in eval mode."""
        if "layers" in plan:
            return only_layers(self.model, plan["layers"])
        ranks: dict[str, int] = plan["ranks"]
        if method.startswith("svd-"):
            small = compress(self.model, ranks, factorizations=self._svds(ranks))
        else:
            small = compress(self.model, ranks, batches=self.batches, sequential=True)
        assert isinstance(small, PreTrainedModel)  # a copy of one
        return small

    def loss(self, model: nn.Module) -> float:
        """Mean loss on the calibration rows."""
        with frozen(model):
            return mean_loss(model, self.batches)

    def _svds(self, names: Any) -> _Found:
        missing = [name for name in names if name not in self.svds]
        self.svds.update(factorize_modules(self.model, missing))
        return {name: self.svds[name] for name in names}

    def _depth(self, method: str, speedup: float) -> dict[str, Any]:
        layers = len(encoder_layers(self.model))
        gives = {kept: self.speeds.depth_speedup(kept) for kept in range(1, layers + 1)}
        kept = min(gives, key=lambda count: abs(gives[count] / speedup - 1))
        which = first_layers if method == "first-layers" else alternate_layers
        return {
            "layers": which(layers, kept),
            "speedup": gives[kept],
            "weights_share": kept / layers,
            "knobs": [[kept, gives[kept]]],
        }

    def _fraction(self, speedup: float) -> dict[str, Any]:
        costs = fill(self.speeds.of(encoder_linears(self.model)), step=4)
        best = min(
            np.linspace(0, 1, 1001),
            key=lambda share: abs(costs.speedup(_share(costs, share)) / speedup - 1),
        )
        ranks = _share(costs, best)
        return _plan(costs, ranks) | {"knobs": [[float(best), costs.speedup(ranks)]]}

    def _latency(self, method: str, speedup: float) -> dict[str, Any]:
        family = method.removesuffix("-latency")
        if family not in self.alone:
            started = time.perf_counter()
            measured = self._measured(family)
            self.alone[family] = (*measured, time.perf_counter() - started)
        costs, increases, seconds = self.alone[family]
        ranks = least_loss(costs, increases, speedup)
        return _plan(costs, ranks) | {
            "knobs": [[speedup, costs.speedup(ranks)]],
            "temperature": self._judged[1],
            "measured_seconds": seconds,
        }

    def _measured(self, family: str) -> tuple[Costs, dict[str, np.ndarray]]:
        """Return costs, and what each module alone adds to the loss; takes minutes."""
        names = searchable(self.model)
        measured = self.speeds.of(names).faster()
        if family == "svd":
            found = self._svds(names)
        else:
            modules = {n: self.model.get_submodule(n) for n in names}
            sources = [input_name(module, n) for n, module in modules.items()]
            moments = calibrate(self.model, self.batches, sources)
            found = factorize_modules(self.model, names, moments)
        costs = fill(measured).faster()
        return costs, self._increases(found, measured, costs)

    def _increases(
        self, found: _Found, measured: Costs, costs: Costs
    ) -> dict[str, np.ndarray]:
        """Say what each module alone adds to the loss at each rank of `costs`.

        Measured at some ranks, `MEASURED` of each module, the smallest among them; in
        between it goes as the squared error of the outputs, piece by piece.
        """
        small = copy.deepcopy(self._judged[0])
        increases = {}
        with frozen(small):
            walk = Walk(small, self.batches, costs.modules)
            dense_loss = walk.loss()
            for _ in walk.layers:
                for name in [name for group in walk.groups() for name in group]:
                    ranks = measured.modules[name].ranks
                    # errors (ranks + 1,): 0 for the dense module, which comes last
                    errors = relative_errors(found[name], costs.modules[name].ranks)
                    some = ranks[:: max(1, -(-len(ranks) // MEASURED))]
                    at = relative_errors(found[name], some)[:-1]
                    lost = [self._alone(walk, name, rank, found) for rank in some]
                    # where the loss happens to fall, a little stands for nothing
                    grown = np.maximum(np.array(lost) - dense_loss, 1e-3 * at)
                    x, y = np.append(at, 0.0)[::-1], np.append(grown, 0.0)[::-1]
                    # by growing error, and never falling with it
                    increases[name] = np.interp(errors, x, np.maximum.accumulate(y))
                walk.advance()
        return increases

    @staticmethod
    def _alone(walk: Walk, name: str, rank: int, found: _Found) -> float:
        """Return the loss with one module at a rank; it is dense again afterwards."""
        dense = walk.model.get_submodule(name)
        replace_module(walk.model, name, rank, found[name])
        try:
            return walk.loss()
        finally:
            walk.model.set_submodule(name, dense)

    def _algorithm_2(self, speedup: float, start: float) -> dict[str, Any]:
        costs = self.speeds.of(searchable(self.model))
        plans = {}

        def attempt(budget: float) -> float:
            model, _ = self._judged
            plans[budget] = search_ranks(model, self.batches, budget, times=costs)
            return plans[budget].predicted_speedup

        tried = aim(attempt, speedup, start, WITHIN)
        plan = plans[next(iter(tried))]
        knobs = [[b, gave, plans[b].loss] for b, gave in tried.items()]
        return _plan(costs, plan.ranks) | {
            "knobs": knobs,
            "loss": plan.loss,
            "dense_loss": plan.dense_loss,
            "trials": sum(each.trials for each in plans.values()),
            "temperature": self._judged[1],
        }


def _share(costs: Costs, share: float) -> dict[str, int]:
    """Give every module the rank nearest below a share of its largest."""
    return {
        name: max(
            (rank for rank in module.ranks if rank <= share * module.ranks[-1]),
            default=module.ranks[0],
        )
        for name, module in costs.modules.items()
        if module.ranks
    }


def _plan(costs: Costs, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Say what is known of ranks without a model.

    The share of weights is that of the modules searched.
    """
    return {
        "ranks": dict(ranks),
        "speedup": costs.speedup(ranks),
        "weights_share": costs.weights(ranks) / costs.weights({}),
    }
