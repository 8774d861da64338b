"""Read the finished cases of chapter 6's language models: rows, intervals, clocks."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from drone.lab.cases import Case, read_cases, unpack
from drone.lab.tables import Estimate

BAR = 2.0  # percent of perplexity that may be lost: chapter 6's rule
DRAWS = 1000
JOBS = ("lstm-spectra", "lstm-shares", "lstm-search", "lstm-retrain")


@dataclass(frozen=True)
class Thin:
    """One thin model beside the trained one it was made of.

    Attributes:
        name: in words: the kind of matrices, or the search.
        method: `SVD`, `data-aware`, `dense` (trained on) or `Algorithm 2`.
        share: of the largest ranks that save; nan where a search chose.
        ranks: {module: rank}.
        left: share of the multiply-adds a word that are left.
        valid: growth of the validation perplexity, percent.
        test: growth of the test perplexity, percent, with 95 % over blocks of text.
        blocks: (blocks,) difference of the mean losses of the test text, nats.
        result: of its case, whole.
    """

    name: str
    method: str
    share: float
    ranks: Mapping[str, int]
    left: float
    valid: float
    test: Estimate
    blocks: np.ndarray
    result: Mapping[str, Any]


def grown(nats: float) -> float:
    """Percent by which a perplexity grows when the mean loss grows by `nats`.

    >>> round(grown(math.log(1.02)), 6)
    2.0
    """
    return 100 * math.expm1(nats)


def estimate(blocks: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Growth of a perplexity in percent, with 95 % by a paired block bootstrap.

    Args:
        blocks: (blocks,), difference of the mean losses in nats, of equal parts of
            one text; neighbouring words are alike, so whole blocks are drawn.
        draws: of the bootstrap, seeded.

    >>> f"{estimate(np.full(200, math.log(1.02)))}"
    '2.0 [2.0, 2.0]'
    """
    rng = np.random.default_rng(0)
    means = blocks[rng.integers(len(blocks), size=(draws, len(blocks)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(grown(float(blocks.mean())), grown(low), grown(high))


class Trained:
    """One trained language model and all finished cases made of it.

    Attributes:
        train: the case of its training.
        size: `small`, `medium`, `large` or `tiny`.
        cases: {job: its cases}.
    """

    def __init__(self, train: Case, cases: Mapping[str, Iterable[Case]]) -> None:
        """Take the cases made of this training's weights."""
        self.train, self.size = train, str(train.settings["size"])
        weights = train.result["weights"]
        self.cases = {
            job: [case for case in some if case.settings["weights"] == weights]
            for job, some in cases.items()
        }

    @property
    def perplexity(self) -> float:
        """Of the test text."""
        return math.exp(self.train.result["losses"]["test"])

    @property
    def history(self) -> list[dict[str, float]]:
        """One entry an epoch: `train` and `valid` in nats, `rate`, `seconds`."""
        found: list[dict[str, float]] = self.train.result["history"]
        return found

    @property
    def multiply_adds(self) -> int:
        """Of the dense model, a word: 8d² a layer, two layers, and the decoder's."""
        hidden, words = self.train.settings["hidden"], self.train.settings["words"]
        return int(16 * hidden**2 + words * hidden)

    @property
    def parameters(self) -> int:
        """Of the dense model's matrices."""
        hidden, words = self.train.settings["hidden"], self.train.settings["words"]
        return int(self.multiply_adds + words * hidden)

    @cached_property
    def spectra(self) -> dict[str, dict[str, float]]:
        """{module: shares of its inputs' dimension that hold 90 % of the energy}.

        Of the `weight`, of what comes in (`input`), of what goes out (`output`); with
        `rows`, those of the weight. Empty where that was not measured.
        """
        found = {}
        for case in self.cases["lstm-spectra"]:
            for part, row in case.result["directions"].items():
                shares = {k: row[k] / row["in"] for k in ("weight", "input", "output")}
                found[part] = shares | {"rows": row["out"]}
        return found

    def _thin(self, name: str, method: str, share: float, row: Any) -> Thin:
        blocks = unpack(row["test_blocks"]).astype(float)
        dense = self.train.result["losses"]
        return Thin(
            name,
            method,
            share,
            {k.removesuffix(".weight"): v for k, v in row.get("ranks", {}).items()},
            row["multiply_adds"] / self.multiply_adds,
            grown(row["valid"] - dense["valid"]),
            estimate(blocks),
            blocks,
            row,
        )

    @cached_property
    def shares(self) -> list[Thin]:
        """Kinds of matrices made thin at one share, not retrained."""
        return [
            self._thin(case.settings["kind"], row["method"], row["share"], row)
            for case in self.cases["lstm-shares"]
            for row in case.result
        ]

    @cached_property
    def searched(self) -> list[Thin]:
        """What Algorithm 2 chose, a clock and a budget each."""
        return [
            self._thin(
                f"for {case.settings['clock']}, {100 * case.settings['budget']:g} %",
                "Algorithm 2",
                math.nan,
                case.result,
            )
            for case in self.cases["lstm-search"]
        ]

    @cached_property
    def retrained(self) -> list[Thin]:
        """Models trained on, the dense one (`dense`, share 1) among them."""
        return [
            self._thin(
                case.settings["kind"],
                case.settings["method"],
                case.settings["share"],
                case.result,
            )
            for case in self.cases["lstm-retrain"]
        ]

    def of(self, kind: str, method: str) -> list[Thin]:
        """Those of `shares` of one kind and method, the thinnest first."""
        found = [r for r in self.shares if (r.name, r.method) == (kind, method)]
        return sorted(found, key=lambda row: row.share)

    def smallest(self, kind: str, method: str, bar: float = BAR) -> Thin | None:
        """Chapter 6's rule: the smallest within the bar on *validation* text."""
        kept = [row for row in self.of(kind, method) if row.valid <= bar]
        return min(kept, key=lambda row: row.left, default=None)

    def over(self, kind: str, share: float) -> Estimate:
        """Perplexity of data-aware factors over plain SVD's at one share, percent.

        Raises:
            ValueError: one of the two was not made.
        """
        pair = [
            row.blocks
            for method in ("data-aware", "SVD")
            for row in self.of(kind, method)
            if row.share == share
        ]
        if len(pair) != 2:
            raise ValueError(f"{self.size}, {kind}: no two models at a share {share}.")
        return estimate(pair[0] - pair[1])


def trained(folder: Path) -> dict[str, Trained]:
    """Return the language models there are, {name: model}, the smallest first.

    A name is the size, and the seed where it is not 0: `large`, `medium, seed 1`.

    Raises:
        ValueError: two trainings of one size and seed: two recipes are two models.

    >>> trained(Path("a folder with no cases"))
    {}
    """
    found: dict[str, Trained] = {}
    cases = {job: read_cases(folder, job) for job in JOBS}
    for case in read_cases(folder, "lstm-train"):
        size, seed = case.settings["size"], case.settings["seed"]
        name = f"{size}, seed {seed}" if seed else size
        if name in found:
            raise ValueError(f"{case.path}: a second training of {name}.")
        found[name] = Trained(case, cases)
    return dict(sorted(found.items(), key=lambda item: item[1].multiply_adds))


def clocked(
    clocks: Iterable[Case], size: str, ranks: Mapping[str, int], length: int
) -> Estimate | None:
    """Return the measured speed-up of a thin language model, found by its *ranks*.

    A clock is asked for a shape, never for a name: a plan that was called after a
    model it did not have the ranks of once stood in a verdict.

    Args:
        clocks: cases of `drone.lab.clocks`.
        size: of the language model.
        ranks: {module: rank}.
        length: of the text that was timed: 1, a word at a time, or more.

    Returns:
        The speed-up with 95 % over processes; None where nobody timed these ranks.

    Raises:
        ValueError: two clocks of them; one processor is the reference.

    >>> clocked([], "large", {"stack.0.input": 8}, length=1) is None
    True
    """
    found = [
        Estimate(*case.result["speedups"][name])
        for case in clocks
        if (case.settings["encoder"], case.settings["length"])
        == (f"lstm-{size}", length)
        for name, plan in case.settings["plans"].items()
        if plan["ranks"] == dict(ranks)
    ]
    if len(found) > 1:
        raise ValueError(
            f"lstm-{size}, length {length}: {len(found)} clocks, one shape."
        )
    return found[0] if found else None
