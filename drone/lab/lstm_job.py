"""Chapter 6 as cases: an LSTM trained to its end, then thin in every way, each kept.

    python -m drone.lab.lstm_job --size large --cases book/cases/lstm --models runs

The same on a processor and on a GPU. What is finished is read, never run again.
"""

import argparse
import json
import os
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from drone.lab import data
from drone.lab.language import Vocabulary
from drone.lab.lstm_study import Study
from drone.lab.lstm_thin import KINDS, METHODS
from drone.lab.lstm_train import SIZES
from drone.search.costs import Costs

BUDGETS = (0.01, 0.02, 0.05)  # of perplexity
CLOCKS = ("word", "batch")  # what a search's times were measured on
RETRAINED = (0.2, 0.1, 0.3)


def load_texts() -> tuple[Vocabulary, dict[str, Tensor]]:
    """Read Penn Treebank from `$DRONE_DATA/ptb`: `train`, `valid` and `test`.

    Raises:
        FileNotFoundError, ValueError: as `drone.lab.data.load`.
    """
    splits = data.load("ptb", "local")
    vocabulary = Vocabulary.of(splits["train"]["sentence"])
    ids = {
        name: vocabulary.encode(splits[split]["sentence"])
        for name, split in (
            ("train", "train"),
            ("valid", "validation"),
            ("test", "test"),
        )
    }
    return vocabulary, ids


def stages(study: Study, costs: Mapping[str, str]) -> list[tuple[str, Any]]:
    """List all cases of a study, the most telling first."""
    found: list[tuple[str, Any]] = [("train", study.trained)]
    found += [("spectra", study.spectra)]
    kinds = ["products", "but recurrent", *(k for k in KINDS if k != "products")]
    found += [
        (f"shares {kind}", partial(study.shares, kind)) for kind in dict.fromkeys(kinds)
    ]
    found += [
        (f"search {clock} {budget}", partial(study.search, clock, budget, costs[clock]))
        for clock in CLOCKS
        if clock in costs
        for budget in BUDGETS
    ]
    arms = [(method, share) for share in RETRAINED for method in METHODS]
    arms.insert(2, ("dense", 1.0))
    found += [
        (f"retrain {method} {share}", partial(study.retrain, method, share))
        for method, share in arms
    ]
    return found


def read_costs(path: Path, size: str) -> dict[str, str]:
    """Read what a size's modules cost, {clock: `Costs.to_json()`}.

    Raises:
        ValueError: the file is not of that form, or lacks the size.
    """
    try:
        found: dict[str, str] = json.loads(path.read_text())["sizes"][size]
        for text in found.values():
            Costs.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no costs of the size {size} ({error!r}).") from error
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all stages of one study; a stage that fails is told, the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="fewer than the published")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--capture", action="store_true", help="a CUDA graph")
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--costs", type=Path, help="JSON: size → clock → costs")
    parser.add_argument("--only", default="", help="stages whose name begins so")
    asked = parser.parse_args(arguments)
    # Lines of a log are read while the job runs
    print(f"pid {os.getpid()}, {vars(asked)}", flush=True)
    vocabulary, texts = load_texts()
    recipe = SIZES[asked.size].recipe(
        asked.epochs, precision=asked.precision, capture=asked.capture, seed=asked.seed
    )
    study = Study(texts, len(vocabulary), asked.size, recipe, asked.cases, asked.models)
    costs = read_costs(asked.costs, asked.size) if asked.costs else {}
    failed: list[str] = []
    for name, stage in stages(study, costs):
        if not name.startswith(asked.only) and name != "train":
            continue
        try:
            stage()
        except Exception as error:  # whatever it is, the other stages are worth having
            if name == "train":
                raise
            failed.append(name)
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"done, {len(failed)} failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
