"""One LSTM language model of chapter 6: all that is asked of it, each answer a case.

What is finished is read, never run again; a training that was cut off goes on from its
last checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drone.files import sha256, tensors_sha256
from drone.lab.cases import Case, case_key, run_case
from drone.lab.language import STEPS, batches
from drone.lab.lstm_model import LSTMConfig, LSTMLanguageModel
from drone.lab.lstm_read import by_band, compared, mean_losses, read_texts
from drone.lab.lstm_step import Parts
from drone.lab.lstm_thin import (
    METHODS,
    balanced,
    factorize_all,
    names_of,
    parts_of_plan,
    thinned,
    weights_of,
)
from drone.lab.lstm_train import SIZES, Ready, Recipe, draw, load_parts, prepare, train
from drone.math.factorize import Factorization
from drone.math.moments import SecondMoment
from drone.model.calibrate import calibrate, frozen
from drone.model.walk import mean_loss
from drone.search.algorithm2 import search_ranks
from drone.search.costs import Costs

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
RATES = (1.0, 3.0, 10.0)  # offered to every arm; where an end wins, the list grows
EXTENSIONS = 4
TRIAL = 1 / 3  # of the training text, for each rate
AGAIN = 3  # epochs
EVERY = 10  # epochs from checkpoint to checkpoint


class Study:
    """One size, one seed: its training and all that is asked of the trained model.

    Attributes:
        texts: `train`, `valid` and `test`, each (tokens,).
        settings: of the training.
    """

    def __init__(
        self,
        texts: Mapping[str, Tensor],
        words: int,
        size: str,
        recipe: Recipe,
        cases: Path,
        models: Path,
    ) -> None:
        """Set up; nothing is run.

        Args:
            texts: `train`, `valid` and `test`.
            words: in the vocabulary.
            size: one of `SIZES`.
            recipe: how it is trained.
            cases: folder of the finished cases.
            models: folder of weights and checkpoints; it stays on this machine.
        """
        self.texts, self.recipe, self.cases = dict(texts), recipe, cases
        self.size, self.device = SIZES[size], "cpu"
        if torch.cuda.is_available():
            self.device = "cuda"
        config = LSTMConfig(
            vocab_size=words,
            hidden_size=self.size.hidden,
            num_layers=2,
            dropout=self.size.dropout,
        )
        self.shell = LSTMLanguageModel(config).eval()
        self.shell.to(torch.device(self.device))
        self.settings: dict[str, Any] = {
            "size": size,
            "seed": recipe.seed,
            "hidden": self.size.hidden,
            "dropout": self.size.dropout,
            "init": self.size.init,
            "words": words,
            "texts": tensors_sha256(self.texts),
            "recipe": asdict(recipe),
        }
        self.folder = models / f"{size}-{case_key('lstm-train', self.settings)[:12]}"

    # --- the trained model ------------------------------------------------------

    def trained(self) -> Case:
        """Train, or read that it was done; the weights lie in `folder` afterwards."""
        return run_case(self.cases, "lstm-train", self.settings, self._train)

    def _train(self, _: Mapping[str, Any]) -> dict[str, Any]:
        parts = draw(self.shell, self.size.init, self.recipe.seed)
        history, step = train(
            self.shell,
            parts,
            self.texts,
            self.recipe,
            checkpoints=self.folder,
            every=EVERY,
            title=self.settings["size"],
        )
        losses = self._read(parts)
        whole = read_texts(self.shell, parts, {"test": self.texts["test"]}, 1)
        means = mean_losses(losses)
        print(
            f"valid {math.exp(means['valid']):.2f} test {math.exp(means['test']):.2f}",
            flush=True,
        )
        blocks = np.array_split(losses["test"].double().numpy(), 200)
        return {
            "history": history,
            "step": step,
            "losses": means,
            "test_in_one_part": float(whole["test"].double().mean()),
            "test_blocks": [round(float(block.mean()), 5) for block in blocks],
            "weights": sha256(self._weights_file()),
        }

    def _weights_file(self) -> Path:
        """Path of the last checkpoint's weights.

        Raises:
            FileNotFoundError: they are not on this machine.
        """
        found = sorted(self.folder.glob("epoch-*/parts.safetensors"))
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: the training is a finished case, but its weights are "
                "not on this machine."
            )
        return found[-1]

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the trained weights; a setting of all that is made of them.

        Raises:
            ValueError: the file here is not the one the training ended with.
        """
        wanted: str = self.trained().result["weights"]
        if sha256(self._weights_file()) != wanted:
            raise ValueError(f"{self._weights_file()}: not the weights of its case.")
        return wanted

    @cached_property
    def parts(self) -> Parts:
        """The trained weights."""
        assert self.weights  # checked
        return load_parts(self._weights_file(), self.device)

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Losses of the trained model on every token of `valid` and `test`."""
        return self._read(self.parts)

    def _read(self, parts: Parts) -> dict[str, Tensor]:
        texts = {name: self.texts[name] for name in ("valid", "test")}
        return read_texts(self.shell, parts, texts)

    def _scored(self, parts: Parts, bands: bool = True) -> dict[str, Any]:
        """Read both texts with other weights and compare with the trained ones."""
        losses = self._read(parts)
        row: dict[str, Any] = weights_of(parts) | compared(losses, self.dense)
        if bands:
            row["bands"] = by_band(
                losses["test"], self.dense["test"], self.texts["test"], self.counts
            )
        return row

    # --- what the data say ------------------------------------------------------

    @cached_property
    def counts(self) -> Tensor:
        """(words,) how often each occurs in the training text."""
        return torch.bincount(self.texts["train"], minlength=self.settings["words"])

    @cached_property
    def model(self) -> LSTMLanguageModel:
        """The trained model as the library knows it."""
        model = LSTMLanguageModel(self.shell.config)
        model.load_state_dict({name: weight for name, (weight,) in self.parts.items()})
        model.eval().to(torch.device(self.device))
        return model

    @cached_property
    def moments(self) -> dict[str, SecondMoment]:
        """Second moments on a random tenth of the training text, as in chapter 6."""
        all_windows = batches(self.texts["train"])
        count = max(1, round(0.1 * len(all_windows)))
        drawn = np.random.default_rng(0).permutation(len(all_windows))[:count]
        # Each window begins from zeros, so ten of them make one larger batch
        joined = [
            {
                key: torch.cat([all_windows[i][key] for i in drawn[at : at + 10]])
                for key in all_windows[0]
            }
            for at in range(0, count, 10)
        ]
        return calibrate(self.model, joined)

    @cached_property
    def found(self) -> dict[str, dict[str, Factorization]]:
        """{method: one decomposition a matrix}."""
        return {
            method: factorize_all(self.parts, self.moments, self.counts, method)
            for method in METHODS
        }

    # --- cases ------------------------------------------------------------------

    def _case(self, job: str, function: Any, **more: Any) -> Case:
        """Run a case of the trained model, or read it, and say so in a line."""
        settings = {
            "size": self.settings["size"],
            "seed": self.settings["seed"],
            "training": case_key("lstm-train", self.settings),
            "weights": self.weights,
            **more,
        }
        case = run_case(self.cases, job, settings, function)
        print(
            f"{job} {more}: {'there' if case.found else f'{case.seconds:.1f} s'}",
            flush=True,
        )
        return case

    def spectra(self) -> Case:
        """Say how many directions hold 90 % of weights, inputs and outputs."""
        return self._case("lstm-spectra", self._spectra, calibration=0.1)

    def _spectra(self, _: Mapping[str, Any]) -> dict[str, Any]:
        rows = {}
        for part, moment in self.moments.items():
            weight = self.parts[f"{part}.weight"][0].double()
            energy = self.found["data-aware"][f"{part}.weight"].energy
            rows[part] = {
                "out": weight.shape[0],
                "in": weight.shape[1],
                "weight": _needed(torch.linalg.eigvalsh(weight.T @ weight)),
                "input": _needed(torch.linalg.eigvalsh(moment.matrix.to(weight))),
                "output": int((energy < 0.9).sum()),
            }
        return {"directions": rows, "tokens": next(iter(self.moments.values())).count}

    def shares(self, kind: str) -> Case:
        """Make one kind of matrices thin at each share, by both methods."""
        return self._case(
            "lstm-shares", self._shares, kind=kind, shares=list(SHARES), calibration=0.1
        )

    def _shares(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        kind, rows = settings["kind"], []
        for share in settings["shares"]:
            for method in METHODS:
                parts = thinned(self.parts, self.found[method], kind, share)
                ranks = {n: parts[n][0].shape[1] for n in names_of(kind, parts)}
                row = {"share": share, "method": method, "ranks": ranks}
                rows.append(row | self._scored(parts, kind in ("products", "all")))
        return rows

    def search(self, clock: str, budget: float, costs: str) -> Case:
        """Let Algorithm 2 choose, on the first half of the validation text."""
        return self._case(
            "lstm-search",
            partial(self._search, costs=costs),
            clock=clock,
            budget=budget,
            costs=tensors_sha256({"": torch.tensor(list(costs.encode()))}),
            text="first half of valid",
            batch_size=100,
        )

    def _search(self, settings: Mapping[str, Any], costs: str) -> dict[str, Any]:
        half = len(self.texts["valid"]) // 2
        width = max(1, min(settings["batch_size"], half // (2 * STEPS)))
        unseen = batches(self.texts["valid"][:half], width)
        with frozen(self.model):
            loss = mean_loss(self.model, unseen)
        # A budget of perplexity is one of nats: the loss may grow by log(1 + budget)
        budget = math.log1p(settings["budget"]) / loss
        plan = search_ranks(self.model, unseen, budget, times=Costs.from_json(costs))
        parts = parts_of_plan(self.parts, plan.modules)
        return {
            "ranks": plan.ranks,
            "loss": plan.loss,
            "dense_loss": plan.dense_loss,
            "budget": plan.budget,
            "trace": plan.trace,
            "trials": plan.trials,
            "layer_forwards": plan.layer_forwards,
            "seconds": plan.seconds,
            "predicted_speedup": plan.predicted_speedup,
        } | self._scored(parts)

    def retrain(self, method: str, share: float, trial: float = TRIAL) -> Case:
        """Train on from thin factors, at a rate the second half of `valid` chooses.

        Args:
            method: one of `METHODS`, or `dense`: the trained model itself, which the
                others are compared with.
            share: of the weights; 1 for `dense`.
            trial: share of the training text that each rate is tried on.
        """
        return self._case(
            "lstm-retrain",
            self._retrain,
            method=method,
            share=share,
            kind="products",
            epochs=AGAIN,
            rates=list(RATES),
            extensions=EXTENSIONS,
            trial=round(trial, 3),
            precision=self.recipe.precision,
            capture=self.recipe.capture,
        )

    def _retrain(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        start = self.parts
        if settings["method"] != "dense":
            found = self.found[settings["method"]]
            start = thinned(start, found, settings["kind"], settings["share"])
        start = balanced(start)
        parts: Parts = {n: tuple(f.clone() for f in fs) for n, fs in start.items()}
        ready = prepare(self.shell, parts, self.texts["train"], self.recipe)
        first = max(1, round(settings["trial"] * len(ready.cut)))
        few = Ready(ready.step, ready.cut[:first], ready.report)
        valid = {"valid": self.texts["valid"]}

        def run(rate: float, on: Ready, epochs: int) -> list[dict[str, float]]:
            for name, factors in parts.items():
                for factor, old in zip(factors, start[name], strict=True):
                    factor.copy_(old)
            recipe = Recipe(
                epochs,
                rate,
                self.recipe.clip,
                linear=True,
                precision=self.recipe.precision,
                capture=self.recipe.capture,
                seed=self.recipe.seed + 1,
            )
            title = f"{settings['method']} {settings['share']} rate {rate:g}"
            return train(self.shell, parts, self.texts, recipe, ready=on, title=title)[
                0
            ]

        def trial(rate: float) -> float:
            try:
                run(rate, few, 1)
                losses = read_texts(self.shell, parts, valid)
            except ValueError as error:  # it diverged: a rate that cannot be chosen
                print(f"rate {rate:g}: {error}", flush=True)
                return math.inf
            return mean_losses(losses)["valid_second"]

        before = mean_losses(read_texts(self.shell, parts, valid))["valid_second"]
        rate, tried = chosen_rate(trial, settings["rates"], settings["extensions"])
        history = run(rate, ready, settings["epochs"])
        return {
            "before": before,
            "trials": [
                {"rate": r, "valid_second": v if math.isfinite(v) else None}
                for r, v in sorted(tried.items())
            ],
            "rate": rate,
            "at_an_end": rate in (min(tried), max(tried)),
            "history": history,
            "step": ready.report,
        } | self._scored(parts)


def chosen_rate(
    trial: Any, rates: list[float], extensions: int
) -> tuple[float, dict[float, float]]:
    """Try rates until the best one has a worse one on both sides.

    Args:
        trial: rate → loss.
        rates: at least two, ascending; where an end is best, the list grows there by
            its first ratio.
        extensions: the most rates that are added.

    Returns:
        The best rate, and the loss of each that was tried.

    >>> chosen_rate(lambda rate: (rate - 5) ** 2, [1.0, 2.0], 3)
    (4.0, {1.0: 16.0, 2.0: 9.0, 4.0: 1.0, 8.0: 9.0})
    """
    tried = {rate: trial(rate) for rate in rates}
    ratio = rates[1] / rates[0]
    for _ in range(extensions):
        best = min(tried, key=tried.__getitem__)
        if best == min(tried):
            new = best / ratio
        elif best == max(tried):
            new = best * ratio
        else:
            break
        tried[new] = trial(new)
    return min(tried, key=tried.__getitem__), tried


def _needed(values: Tensor) -> int:
    """Directions that hold 90 % of the sum of eigenvalues."""
    energy = values.clamp_min(0).flip(0).cumsum(0)
    return int((energy < 0.9 * energy[-1]).sum()) + 1
