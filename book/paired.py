"""Pairs of chapter 7's models on the same rows: `book/results/07-paired.json`.

    DRONE_DATA=/path/to/data python book/paired.py

The chapter's page has an interval for each model against the dense one. Whether two
thin models differ is another question: it is asked of the rows that tell them apart.
This needs the tasks' labels, which are not ours to give, so what comes out is kept.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from drone.files import whole_file
from drone.lab import data
from drone.lab.metrics import METRICS

BOOK = Path(__file__).resolve().parent
CASES = BOOK / "results" / "07-cases"
KEPT = BOOK / "results" / "07-paired.json"
DRAWS = 1000
TASKS = ("mrpc", "rte", "stsb", "cola", "sst2")
LARGE = ("mpnet-base-mrpc",)
DENSE, PLAIN, TAUGHT = "dense", "DRONE", "DRONE + teacher"

# name → cases, the better model or several of which the best counts, the worse one
Pair = tuple[Sequence[str], Sequence[str], Sequence[str]]
SMALL = [f"minilm-{task}" for task in TASKS]
LAYERS = ("fewer layers + teacher", "fewer layers, whole recipe")


def without(task: str) -> list[str]:
    """Name MiniLM's cases of all tasks but one."""
    return [name for name in SMALL if name != f"minilm-{task}"]


PAIRS: dict[str, Pair] = {
    "plain": (SMALL, [DENSE], [PLAIN]),
    "plain_but_rte": (without("rte"), [DENSE], [PLAIN]),
    "teaching": (SMALL, [PLAIN], [TAUGHT]),
    "teaching_stsb": (["minilm-stsb"], [PLAIN], [TAUGHT]),
    "teaching_cola": (["minilm-cola"], [PLAIN], [TAUGHT]),
    "teaching_large": (LARGE, [TAUGHT], [PLAIN]),
    "layers_large": (LARGE, [TAUGHT], LAYERS[1:]),
    "lead_but_stsb": (without("stsb"), [TAUGHT], LAYERS),
    "svd_again": (SMALL, ["SVD + retrain"], ["fewer layers + retrain"]),
    "svd_but_stsb": (without("stsb"), [DENSE], ["SVD"]),
}


@cache
def seeds_of(case: str) -> list[dict[str, np.ndarray]]:
    """Logits of all models of a case, {method: (rows, outputs)}, a seed each."""
    found = []
    for path in sorted(CASES.glob(f"{case}-[0-9]-0.2.json")):
        logits = json.loads(path.read_text())["case"]["logits"]
        found.append({name: np.asarray(each) for name, each in logits.items()})
    if not found:
        raise FileNotFoundError(f"no case {case} in {CASES}.")
    return found


def points(task: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """Score in points, by the task's first metric."""
    metric = next(iter(METRICS[task].values()))
    return 100 * metric(logits, labels)


def drawn(count: int) -> list[np.ndarray]:
    """Return the rows as they are, then `DRAWS` draws of as many, with repetition."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(count, size=count) for _ in range(DRAWS)]
    return [np.arange(count), *draws]


def gap(case: str, better: Sequence[str], worse: Sequence[str]) -> np.ndarray:
    """Draw the rows anew and say what `worse` loses more, seeds averaged.

    Of several names the one counts that scores best on the rows as they are.

    Returns:
        (1 + DRAWS,): the value, then the draws.
    """
    task = case.rpartition("-")[2]
    labels, seeds = data.dev_labels(task), seeds_of(case)

    def best(names: Sequence[str]) -> str:
        return max(
            names, key=lambda n: np.mean([points(task, s[n], labels) for s in seeds])
        )

    one, other = best(better), best(worse)
    return np.array(
        [
            np.mean(
                [
                    points(task, seed[one][i], labels[i])
                    - points(task, seed[other][i], labels[i])
                    for seed in seeds
                ]
            )
            for i in drawn(len(labels))
        ]
    )


def summary(each: np.ndarray) -> list[float]:
    """Return the value and the middle 95 % of the draws behind it."""
    low, high = np.percentile(each[1:], [2.5, 97.5])
    return [round(float(number), 3) for number in (each[0], low, high)]


def seeds_apart() -> list[float]:
    """Say how much more CoLA's seed 1 loses than its seed 0, DRONE beside dense."""
    labels, seeds = data.dev_labels("cola"), seeds_of("minilm-cola")

    def lost(seed: Mapping[str, np.ndarray], i: np.ndarray) -> float:
        dense, thin = (points("cola", seed[n][i], labels[i]) for n in (DENSE, PLAIN))
        return dense - thin

    gaps = [lost(seeds[1], i) - lost(seeds[0], i) for i in drawn(len(labels))]
    return summary(np.array(gaps))


def compute() -> dict[str, list[float]]:
    """Return {name: [points, low, high]} of all pairs."""
    found = {}
    for name, (cases, better, worse) in PAIRS.items():
        gaps = [gap(case, better, worse) for case in cases]
        found[name] = summary(np.mean(gaps, axis=0))
    return found | {"seeds_cola": seeds_apart()}


if __name__ == "__main__":
    with whole_file(KEPT) as temporary:
        temporary.write_text(json.dumps(compute(), indent=1) + "\n")
    print(KEPT.read_text())
