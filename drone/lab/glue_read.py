"""Read chapter 7's finished cases: points lost by each method, and pairs of methods."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from drone.lab import data
from drone.lab.arms import ARMS, Arm
from drone.lab.cases import Case, read_cases, unpack
from drone.lab.clocks import DENSE, over_processes
from drone.lab.differences import majority, paired
from drone.lab.metrics import METRICS
from drone.lab.tables import Estimate

# Key → a method's name where all seven stand beside each other.
TITLES = {
    "svd-fraction": "SVD, one fraction",
    "svd-latency": "SVD, its own search",
    "drone-fraction": "DRONE, one fraction",
    "drone-latency": "DRONE, latency search",
    "drone-algorithm2": "DRONE, Algorithm 2",
    "alternate-layers": "every second layer",
    "first-layers": "the first layers",
}
ENCODERS = {"minilm": "MiniLM", "mpnet-base": "MPNet", "bert-base": "BERT"}
LEARNT = 3  # standard errors above the commonest label
Key = tuple[str, str]  # method, name of a retraining


def arm_name(arm: Mapping[str, Any]) -> str:
    """Name a retraining as `Arm.named` takes it, such as `full` or `0.01x3`.

    Args:
        arm: `share`, `epochs`, `teacher`, from a case's settings.

    >>> arm_name({"share": 0.01, "epochs": 3, "teacher": True})
    '0.01x3'
    """
    wanted = Arm(**arm)
    names = [name for name, known in ARMS.items() if known == wanted]
    return names[0] if names else f"{wanted.share:g}x{wanted.epochs}"


@dataclass
class Study:
    """All finished cases of one encoder on one task, at one speed.

    Attributes:
        encoder: of `drone.lab.encoders.ENCODERS`.
        task: of `drone.lab.data.TASKS`.
        labels: of the development rows, (rows,).
        dense: {seed: case}.
        plans: {method: {seed: case}}, the ranks or layers found.
        arms: {(method, retraining): {seed: case}}.
    """

    encoder: str
    task: str
    labels: np.ndarray
    dense: dict[int, Case] = field(default_factory=dict)
    plans: dict[str, dict[int, Case]] = field(default_factory=dict)
    arms: dict[Key, dict[int, Case]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As tables and figures call it, such as `MPNet on RTE`."""
        encoder = self.encoder.removesuffix("-float16")
        task = data.TASKS[self.task].folder or self.task
        return f"{ENCODERS.get(encoder, encoder)} on {task}"

    @property
    def metric(self) -> str:
        """Name of the task's first metric."""
        return next(iter(METRICS[self.task]))

    @property
    def score(self) -> float:
        """Mean of the dense models, in points."""
        scores = [case.result["dev"][self.metric] for case in self.dense.values()]
        return float(np.mean(scores))

    @property
    def floor(self) -> float:
        """Points of always giving the commonest label; of a correlation 0."""
        if self.metric == "accuracy":
            return majority(self.task, self.labels)
        return 0.0

    @property
    def error(self) -> float:
        """Standard error, in points, of a model that has learnt nothing.

        √(p (1 − p) / n) of an accuracy p, 1 / √(n − 1) of a correlation: n rows.
        """
        count, share = len(self.labels), self.floor / 100
        if self.metric == "accuracy":
            return float(100 * (share * (1 - share) / count) ** 0.5)
        return float(100 / (count - 1) ** 0.5)

    @property
    def learnt(self) -> bool:
        """Whether every dense model is `LEARNT` standard errors above the floor."""
        least = min(case.result["dev"][self.metric] for case in self.dense.values())
        return bool(least >= self.floor + LEARNT * self.error)

    def logits(self, of: Key | None, seeds: Iterable[int]) -> np.ndarray:
        """Return what models said of the development rows, (seeds, rows, outputs).

        Args:
            of: method and retraining; None: the dense models.
            seeds: in this order.
        """
        cases = self.dense if of is None else self.arms[of]
        found = [unpack(cases[seed].result["dev_logits"]) for seed in seeds]
        return np.stack(found).astype(np.float32)

    def lost(self, of: Key, draws: int = 1000) -> Estimate:
        """Points lost against the dense models of the same seeds, with 95 %.

        Raises:
            KeyError: no such case is finished.
        """
        return self.over(of, None, draws)

    def over(self, worse: Key, better: Key | None, draws: int = 1000) -> Estimate:
        """Points that one loses more than another, with 95 % over seeds and rows.

        Args:
            worse: method and retraining.
            better: the same; None: the dense models.
            draws: of the bootstrap.

        Raises:
            KeyError: no such case is finished.
            ValueError: the two have no seed in common.
        """
        others = self.dense if better is None else self.arms[better]
        seeds = sorted(self.arms[worse].keys() & others.keys())
        if not seeds:
            raise ValueError(f"{worse} and {better} have no seed in common.")
        two = self.logits(worse, seeds), self.logits(better, seeds)
        return paired(self.task, self.labels, *two, draws)

    def chosen_by(self, of: Key) -> str:
        """Return what chose a retraining's rate: `held score`, or once `held loss`.

        Raises:
            KeyError: no such case is finished.
        """
        return _chosen_by(next(iter(self.arms[of].values())))

    def speedup(self, method: str) -> float:
        """Mean over the seeds of the speed-up a method's plans are predicted."""
        found = [case.result["speedup"] for case in self.plans[method].values()]
        return float(np.mean(found))

    def clocked(self, clocks: Sequence[Case]) -> dict[str, Estimate]:
        """Return {method: measured speed-up}, of the clocks that timed these plans.

        Shapes are looked up, never names; and a clock is of this study only if it timed
        ranks of it, for every task has the same first layers and other lengths. Where
        it timed the plans of several seeds: their mean (of logarithms), 95 % over
        processes.

        Args:
            clocks: cases of `drone.lab.clocks`.

        Raises:
            ValueError: two clocks timed a method's plans; one may not win unseen.
        """
        found: dict[str, Estimate] = {}
        for clock in clocks:
            named = {
                method: [
                    name
                    for name, plan in clock.settings["plans"].items()
                    if plan in [_shape(case) for case in cases.values()]
                ]
                for method, cases in self.plans.items()
            }
            plans = [clock.settings["plans"][n] for n in chain(*named.values())]
            if not any("ranks" in plan for plan in plans):
                continue
            for method, names in named.items():
                if names and method in found:
                    raise ValueError(f"{clock.path}: {method} was timed by another.")
                if len(names) == 1:
                    found[method] = Estimate(*clock.result["speedups"][names[0]])
                elif names:
                    logs = [
                        np.mean([np.log(each[DENSE] / each[name]) for name in names])
                        for each in clock.result["seconds"]
                    ]
                    found[method] = over_processes(logs)
        return found


def studies(
    store: Path, labels_source: str = "local", speedup: float = 2.0
) -> dict[tuple[str, str], Study]:
    """Read all finished cases: {(encoder, task): what was found}.

    Args:
        store: folder of cases.
        labels_source: of the development rows, as in `drone.lab.data.load`.
        speedup: asked of the methods.

    Raises:
        ValueError, FileNotFoundError: as `read_cases` and `drone.lab.data.load`; two
            cases of one seed that differ in their other settings; seeds whose rates
            were not chosen alike.

    >>> studies(Path("a folder with no cases"))
    {}
    """
    found: dict[tuple[str, str], Study] = {}
    for case in read_cases(store, "dense"):
        encoder, task = (case.settings[name] for name in ("encoder", "task"))
        if (encoder, task) not in found:
            rows = case.settings["dev_rows"]
            labels = data.dev_labels(task, labels_source, rows)
            found[encoder, task] = Study(encoder, task, labels)
        _keep(found[encoder, task].dense, case)
    for job in ("ranks", "retrain"):
        for case in read_cases(store, job):
            told = case.settings
            study = found.get((told["encoder"], told["task"]))
            if study is None or told["speedup"] != speedup:
                continue
            if job == "ranks":
                cases = study.plans.setdefault(told["method"], {})
            else:
                key = told["method"], arm_name(told["arm"])
                cases = study.arms.setdefault(key, {})
            _keep(cases, case)
    return found


def _keep(cases: dict[int, Case], case: Case) -> None:
    """Keep a case by its seed; of two that differ elsewhere none may win unseen."""
    first = next(iter(cases.values()), case)
    one, two = _chosen_by(first), _chosen_by(case)
    if one != two:
        raise ValueError(
            f"{first.path} chose its rate by the {one}, {case.path} by the {two}; keep "
            "one kind."
        )
    other = cases.setdefault(case.settings["seed"], case)
    if other is not case:
        raise ValueError(
            f"{case.path} and {other.path}: one seed twice; keep one of them."
        )


def _chosen_by(case: Case) -> str:
    """What chose a rate; the oldest cases do not say it."""
    name: str = case.settings.get("chosen_by", "held loss")
    return name


def _shape(plan: Case) -> dict[str, Any]:
    """What a clock times of a plan."""
    return {k: plan.result[k] for k in ("ranks", "layers") if k in plan.result}
