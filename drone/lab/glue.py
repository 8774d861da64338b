"""One task, one encoder, one seed: dense, ranks by each method, retraining. Chapter 7.

Each stage is a case of its own: kept as soon as it is finished, never run twice.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drone.devices import placed
from drone.files import check_sha256, sha256, whole_file
from drone.lab import data, encoders
from drone.lab.arms import Arm
from drone.lab.batches import tokenize
from drone.lab.cases import Case, case_key, pack, read_cases, run_case
from drone.lab.ladder import AS_IS, RATES, START, Judged, best_of, climb
from drone.lab.loop import Loss, logits_of, task_loss, train
from drone.lab.methods import FITTED, Methods
from drone.lab.metrics import METRICS
from drone.lab.parts import Rows, Split, pad_rows, split
from drone.lab.speeds import Speeds
from drone.lab.temper import last_linear
from drone.lab.training import Recipe, bfloat16_gains, teacher_loss

CALIBRATION_BATCH = 128  # rows at once where nothing is trained
CHOSEN_BY = "held score"  # cases that do not say so chose by the held loss


def settings_of(
    encoder: str,
    task: str,
    seed: int,
    recipe: Recipe,
    *,
    source: str = "embedded",
    data_source: str = "local",
    rows: int = 0,
    dev_rows: int = 0,
    calibration_rows: int = 1000,
    retrain_rows: int = 0,
) -> dict[str, Any]:
    """Collect all that decides a dense model, as the key of its case.

    Args:
        encoder: one of `drone.lab.encoders.ENCODERS`.
        task: one of `drone.lab.data.TASKS`.
        seed: of the parts, the head, the order of batches and dropout.
        recipe: of the fine-tuning.
        source: of the encoder, as in `drone.lab.encoders.encoder`.
        data_source: as in `drone.lab.data.load`.
        rows: take so many rows of the training split; 0: all.
        dev_rows: score so many; 0: all.
        calibration_rows: use at most so many of the calibration part.
        retrain_rows: retrain on at most so many of the fit rows; 0: on all.
    """
    return {
        "encoder": encoder,
        "task": task,
        "seed": seed,
        "recipe": asdict(recipe),
        "source": source,
        "data_source": data_source,
        "rows": rows,
        "dev_rows": dev_rows,
        "calibration_rows": calibration_rows,
        "retrain_rows": retrain_rows,
        "precision": "bfloat16" if bfloat16_gains() else "float32",
    }


class Bench:
    """The cases of one dense model.

    Attributes:
        settings: from `settings_of`.
        speeds: of the encoder's shapes on the reference processor.
        store: folder of the cases.
        weights: folder of the dense models' weights, which are no part of a case.
        budget: that Algorithm 2 tries first.
        device: where everything runs.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        speeds: Speeds,
        store: Path,
        weights: Path,
        device: torch.device,
        budget: float = 0.15,
    ) -> None:
        """Note what is wanted; nothing is read or run before a stage needs it."""
        self.settings, self.speeds = dict(settings), speeds
        self.store, self.weights, self.device = store, weights, device
        self.budget = budget
        self.task: str = settings["task"]
        self.recipe = Recipe(**settings["recipe"])
        self._built: dict[tuple[str, float], PreTrainedModel] = {}

    # --- rows ---------------------------------------------------------------------

    @cached_property
    def _start(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The encoder with a fresh head, and its tokenizer."""
        wanted = self.settings
        return encoders.encoder(
            wanted["encoder"],
            wanted["source"],
            num_labels=len(data.TASKS[self.task].labels or ("score",)),
            seed=wanted["seed"],
        )

    @cached_property
    def _corpus(self) -> tuple[Rows, Rows]:
        """Training and development rows."""
        dev = data.TASKS[self.task].dev_split
        wanted = self.settings["rows"], self.settings["dev_rows"]
        return self.rows_of("train", wanted[0]), self.rows_of(dev, wanted[1])

    def rows_of(self, name: str, most: int = 0) -> Rows:
        """Read a split of the task, tokenized: at most so many rows of it; 0: all."""
        part = data.load(self.task, self.settings["data_source"], [name])[name]
        if most:
            part = data.sample(part, most, 0)
        tokens = tokenize(part, self._start[1], self.task, self.recipe.max_length)
        return pad_rows(tokens[:], self._start[1], self.device)

    @cached_property
    def split(self) -> Split:
        """The numbers of the training rows in each part."""
        return split(len(self._corpus[0]), self.settings["seed"])

    @cached_property
    def fit(self) -> Rows:
        """Rows that models are fitted to."""
        return self._corpus[0].select(self.split.fit)

    @cached_property
    def held(self) -> Rows:
        """Rows that choose."""
        return self._corpus[0].select(self.split.held)

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Rows that calibrate and judge ranks, as batches."""
        return self._batches(self.split.calibration)

    def _batches(self, numbers: np.ndarray) -> list[dict[str, Tensor]]:
        """The first of these rows, as many as calibrate."""
        count = len(self.split.calibration[: self.settings["calibration_rows"]])
        rows = self._corpus[0].select(numbers[:count])
        return [batch for _, batch in rows.batches(CALIBRATION_BATCH)]

    @property
    def dev(self) -> Rows:
        """Development rows, which do nothing but report."""
        return self._corpus[1]

    @property
    def dev_labels(self) -> np.ndarray:
        """Of the development rows, (rows,)."""
        labels: np.ndarray = self.dev.labels.cpu().numpy()
        return labels

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
        """All metrics of the task, in points; None where a correlation has no value."""
        said, right = logits.cpu().numpy(), labels.cpu().numpy()
        found = {name: 100 * m(said, right) for name, m in METRICS[self.task].items()}
        return {name: None if isnan(x) else x for name, x in found.items()}

    def report(self, model: PreTrainedModel) -> dict[str, Any]:
        """Score a finished model on the development rows."""
        logits = logits_of(model, self.dev)
        held = self.scores(logits_of(model, self.held), self.held.labels)
        return {
            "held": held,
            "dev": self.scores(logits, self.dev.labels),
            "dev_logits": pack(logits.cpu()),
        }

    # --- dense --------------------------------------------------------------------

    @property
    def _weights(self) -> Path:
        """The dense model's file."""
        key = case_key("dense", self.settings)
        return self.weights / f"{key[:20]}.safetensors"

    def dense(self) -> Case:
        """Fine-tune on the fit rows, or read the case."""
        return run_case(self.store, "dense", self.settings, lambda _: self._dense())

    def _dense(self) -> dict[str, Any]:
        model = placed(copy.deepcopy(self._start[0]), self.device)
        fit = self.fit
        if model.config.num_labels == 1:
            # a head that starts at the mean score need not first learn it
            with torch.no_grad():
                last_linear(model).bias.fill_(float(fit.labels.mean()))
        train(model, fit, fit.labels, task_loss, self.recipe, self.settings["seed"])
        with whole_file(self._weights) as temporary:
            state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
            save_file(state, temporary)
            digest = sha256(temporary)
        parts = {
            "fit": len(fit),
            "held": len(self.held),
            "calibration": sum(len(batch["labels"]) for batch in self.calibration),
        }
        return self.report(model) | {"rows": parts, "weights": digest}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model; it is fine-tuned if it was not yet.

        Raises:
            FileNotFoundError: the case is there, its weights are on another machine.
            ValueError: the weights are not those of the case.
        """
        case = self.dense()
        if not self._weights.is_file():
            raise FileNotFoundError(
                f"{case.path} is finished, but its weights, {self._weights}, are not "
                "here. Put them there, or delete the case to fine-tune anew."
            )
        check_sha256(self._weights, case.result["weights"])
        model = copy.deepcopy(self._start[0])
        model.load_state_dict(load_file(self._weights))
        model.eval()
        return placed(model, self.device)

    @cached_property
    def _told(self) -> tuple[Tensor, Tensor]:
        """What the dense model says of the fit rows, and of the held ones."""
        return logits_of(self.model, self.fit), logits_of(self.model, self.held)

    @cached_property
    def _methods(self) -> Methods:
        return Methods(self.model, self.calibration, self.speeds)

    @cached_property
    def _fitted(self) -> Methods:
        """What chapter 5 compares them with: rows that the model may know by heart."""
        return Methods(self.model, self._batches(self.split.fit), self.speeds)

    def methods_of(self, method: str) -> Methods:
        """What finds and builds a method's models, with the rows that it looks at."""
        return self._fitted if method.endswith(FITTED) else self._methods

    # --- ranks --------------------------------------------------------------------

    def ranks(self, method: str, speedup: float) -> Case:
        """Find what a method needs for a predicted speed-up, or read the case.

        Args:
            method: one of `drone.lab.methods.METHODS`.
            speedup: above 1.
        """
        settings = self.on_dense() | {"method": method, "speedup": speedup}
        settings["times"] = _digest(self.speeds.to_json())
        if method.removesuffix(FITTED) == "drone-algorithm2":
            settings["first_budget"] = self.budget

        def find(_: Mapping[str, Any]) -> dict[str, Any]:
            plan = self.methods_of(method).find(method, speedup, self.budget)
            small = self.methods_of(method).build(method, plan)
            self._built[method, speedup] = small
            return plan | {
                "calibration_loss": self._methods.loss(small),
                "dense_calibration_loss": self._methods.loss(self.model),
                "parameters": sum(p.numel() for p in small.parameters()),
            }

        return run_case(self.store, "ranks", settings, find)

    def on_dense(self) -> dict[str, Any]:
        """Settings of a case that starts from this dense model."""
        return self.settings | {"dense": self.dense().result["weights"][:16]}

    def compressed(self, method: str, speedup: float) -> PreTrainedModel:
        """A method's model before any retraining."""
        plan = self.ranks(method, speedup).result
        if (method, speedup) not in self._built:
            built = self.methods_of(method).build(method, plan)
            self._built[method, speedup] = built
        return self._built[method, speedup]

    # --- retraining ---------------------------------------------------------------

    def retrain(
        self, method: str, speedup: float, name: str, rate: float | None = None
    ) -> Case:
        """Train a method's model again, or read the case.

        The same rates are offered to every method and every amount, and to leave the
        model as it is; the score of the held rows chooses.

        Args:
            method: one of `drone.lab.methods.METHODS`.
            speedup: the predicted one.
            name: of the amount, as in `Arm.named`.
            rate: the only one tried, as chosen for another seed; None: those of
                `drone.lab.ladder`.
        """
        arm = Arm.named(name)
        plan = self.ranks(method, speedup).result
        settings = self.on_dense() | {
            "method": method,
            "speedup": speedup,
            "plan": plan_digest(plan),
            "arm": asdict(arm),
            "rates": list(RATES) if rate is None else [rate],
            "first": list(START) if rate is None else [rate],
        }
        if arm.share:
            settings["chosen_by"] = CHOSEN_BY
        return run_case(
            self.store, "retrain", settings, lambda _: self._retrain(settings, arm)
        )

    def _retrain(self, settings: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
        which = settings["method"], settings["speedup"]
        small = self.compressed(*which)
        if arm.share == 0:
            return self.report(small) | {"rate": None, "rates": []}
        held = self.held
        loss = teacher_loss if arm.teacher else task_loss
        judge = self._told[1] if arm.teacher else held.labels
        metric = next(iter(METRICS[self.task]))

        def judged(model: PreTrainedModel) -> Judged:
            logits = logits_of(model, held)
            score = self.scores(logits, held.labels)[metric]
            return Judged(nan if score is None else score, float(loss(logits, judge)))

        tried = {AS_IS: judged(small)}
        best = small  # one trained model in memory is enough

        def attempt(rate: float) -> Judged:
            nonlocal best
            model = self.retrained(*which, arm, rate)
            tried[rate] = judged(model)
            if best_of(tried) == rate:
                best = model
            return tried[rate]

        climb(settings["rates"], settings["first"], attempt)
        return self.report(best) | {
            "rate": best_of(tried),
            "rates": [
                [rate, each.score, each.loss] if each.learnt else [rate, None, None]
                for rate, each in sorted(tried.items())
            ],
            "rows": self._count(arm),
        }

    def _count(self, arm: Arm) -> int:
        """How many of the fit rows an amount of retraining takes."""
        most = self.settings["retrain_rows"] or len(self.fit)
        return max(1, round(arm.share * min(most, len(self.fit))))

    def retrained(
        self, method: str, speedup: float, arm: Arm, rate: float | None
    ) -> PreTrainedModel:
        """Return a method's model trained again at one rate; None or 0: as it is."""
        small = self.compressed(method, speedup)
        if not rate:
            return small
        count = self._count(arm)
        some = self.fit.select(np.arange(count))  # their order is random already
        loss: Loss = teacher_loss if arm.teacher else task_loss
        told = self._told[0] if arm.teacher else self.fit.labels
        how = replace(self.recipe, epochs=arm.epochs, learning_rate=rate)
        model = copy.deepcopy(small)
        train(model, some, told[:count], loss, how, self.settings["seed"])
        return model

    def rate_of_seed(self, seed: int, method: str, speedup: float, name: str) -> float:
        """Return the rate that another seed's held rows chose for the same arm.

        Raises:
            ValueError: that case is not finished.
        """
        wanted = {"encoder": self.settings["encoder"], "task": self.task, "seed": seed}
        wanted |= {"method": method, "speedup": speedup}
        wanted |= {"arm": asdict(Arm.named(name)), "chosen_by": CHOSEN_BY}
        for case in read_cases(self.store, "retrain"):
            same = all(case.settings.get(key) == value for key, value in wanted.items())
            if same and len(case.settings["rates"]) > 1:
                rate: float = case.result["rate"]
                return rate
        raise ValueError(f"no finished case of {wanted}; run that seed first.")


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Return a short name of what a plan makes: its ranks or layers."""
    return _digest(json.dumps([plan.get("ranks"), plan.get("layers")]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
