"""Fine-tuning and its cache, with a tiny random model and MiniLM's real tokenizer."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import ConstantInputWarning
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from drone import LowRankLinear, calibrate, compress
from drone.lab import batches, cache, data, encoders, metrics, trainer, training
from drone.lab.metrics import METRICS, paired_bootstrap
from drone.lab.training import FineTuned, Recipe, fine_tune, retrain

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=1e-3, max_length=32)
Tune = Callable[..., FineTuned]
CHECKED = training.CheckedTrainer  # as it is, whatever a test puts in its place


def pretend_bfloat16(patch: pytest.MonkeyPatch, *, gains: bool) -> None:
    """To the key of a training, and to the training."""
    for module in (training, trainer):
        patch.setattr(module, "bfloat16_gains", lambda: gains)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(encoders.checked_folder("minilm"))
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tiny(tokenizer: PreTrainedTokenizerBase, outputs: int) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=outputs,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(autouse=True)
def tiny_encoder(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    def encoder(
        name: str, source: str = "embedded", num_labels: int = 2, seed: int = 0
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tiny(tokenizer, num_labels), tokenizer

    monkeypatch.setattr(encoders, "encoder", encoder)


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    """`fine_tune` on 48 rows, cached in this test's own folder."""

    def tune(**changes: Any) -> FineTuned:
        options = {"rows": 48, "recipe": RECIPE, "cache": tmp_path / "cache"}
        return fine_tune(**(options | changes))

    return tune


def weights(found: FineTuned) -> dict[str, Tensor]:
    return found.model.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- how sure a difference is ------------------------------------------------------


def logits_of(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits of a model that is right exactly on these rows."""
    return np.eye(2)[np.where(right, labels, 1 - labels)]


def test_the_spread_of_the_bootstrap_is_that_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    before, after = rng.random(400) < 0.9, rng.random(400) < 0.8
    lost = paired_bootstrap(
        "sst2", labels, logits_of(before, labels), logits_of(after, labels), 4000
    )
    gap = before.astype(float) - after  # of one row; a draw is a mean of 400
    assert lost.shape == (4000,)
    assert lost.mean() == pytest.approx(100 * gap.mean(), abs=0.15)
    assert lost.std() == pytest.approx(100 * gap.std() / 20, rel=0.05)


def test_the_same_rows_are_drawn_for_both_models_and_for_one_seed() -> None:
    labels = np.array([0, 1, 1, 0, 1, 0])
    wrong_twice = logits_of(np.array([1, 1, 0, 1, 0, 1]) > 0, labels)
    assert (paired_bootstrap("sst2", labels, wrong_twice, wrong_twice, 50) == 0).all()
    none, all_ = (logits_of(np.full(6, x), labels) for x in (False, True))
    one, two, other = (
        paired_bootstrap("sst2", labels, all_, wrong_twice, 50, seed)
        for seed in (3, 3, 4)
    )
    assert (one == two).all() and (one != other).any()
    rest = paired_bootstrap("sst2", labels, wrong_twice, none, 50, 3)
    assert np.allclose(one + rest, 100)  # draw by draw


def test_a_regression_is_drawn_too_and_an_undefined_correlation_is_nan() -> None:
    labels = np.linspace(0, 5, 30)
    before, after = labels[:, None], labels[::-1, None].copy()
    assert np.allclose(paired_bootstrap("stsb", labels, before, after, 20), 200)
    with pytest.warns(ConstantInputWarning):
        lost = paired_bootstrap("stsb", labels, before, np.zeros((30, 1)), 3)
    assert np.isnan(lost).all()


@pytest.mark.parametrize(
    ("rows", "shape", "draws", "said"),
    [(4, (5, 2), 9, r"\(5, 2\)"), (0, (0, 2), 9, "rows"), (5, (5, 2), 0, "draws")],
)
def test_a_bootstrap_that_makes_no_sense_is_refused(
    rows: int, shape: tuple[int, int], draws: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        paired_bootstrap(
            "sst2", np.zeros(rows), np.zeros(shape), np.zeros(shape), draws
        )


# --- the cache -------------------------------------------------------------------


def test_the_second_call_is_a_hit_that_says_so_and_has_the_same_weights(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = tune()
    assert not first.cached and "cache hit" not in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    second = tune()
    assert second.cached and "cache hit: minilm" in capsys.readouterr().out
    assert equal(weights(first), weights(second))
    assert (first.key, first.seconds) == (second.key, second.seconds)
    assert len(first.key) == 64
    assert not first.model.training and not second.model.training
    torch.manual_seed(0)
    start = tiny(tokenizer, 2).state_dict()
    changed = [k for k, v in weights(first).items() if not torch.equal(v, start[k])]
    assert len(changed) > len(start) / 2  # it was trained at all


def test_the_same_inputs_give_the_same_weights_whatever_ran_before(
    tune: Tune, tmp_path: Path
) -> None:
    first = tune(cache=tmp_path / "one")
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state is what is meant
    random.seed(99)
    assert equal(weights(first), weights(tune(cache=tmp_path / "two")))


def test_a_run_and_a_cache_hit_leave_the_same_random_state_behind(tune: Tune) -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        tune()
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert draws[0] == draws[1]


@pytest.fixture
def key_of(monkeypatch: pytest.MonkeyPatch, tune: Tune) -> Callable[..., str]:
    """The key of a training, which is not begun."""

    class Stop(Exception):
        pass

    plain = cache.cache_key

    def stop(*args: Any) -> str:
        raise Stop(plain(*args))

    def key_of(**changes: Any) -> str:
        monkeypatch.setattr(cache, "cache_key", stop)
        with pytest.raises(Stop) as found:
            tune(**changes)
        return str(found.value)

    return key_of


def test_the_key_changes_with_whatever_goes_into_the_training(
    key_of: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed: list[dict[str, Any]] = [
        {"seed": 1},
        {"rows": 47},
        {"rows": None},
        {"encoder": "mpnet-base"},
    ]
    different = {
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "warmup": 0.2,
        "weight_decay": 0.0,
        "max_length": 16,
    }
    assert set(different) == set(RECIPE.__dataclass_fields__)
    changed += [{"recipe": replace(RECIPE, **{k: v})} for k, v in different.items()]
    pretend_bfloat16(monkeypatch, gains=False)
    keys = [key_of(), *(key_of(**change) for change in changed)]
    assert key_of() == keys[0]
    pretend_bfloat16(monkeypatch, gains=True)
    keys.append(key_of())
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(key_of())
    assert len(set(keys)) == len(keys)


def test_the_key_changes_with_the_task_and_with_each_row(
    key_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRONE_DATA", str(tmp_path))
    for folder in ("CoLA", "SST-2"):
        (tmp_path / "glue" / folder).mkdir(parents=True)
    (tmp_path / "glue/CoLA/train.tsv").write_text("s\t1\t\tgood\ns\t0\t*\tbad\n")
    sst2 = tmp_path / "glue/SST-2/train.tsv"
    local = {"data_source": "local", "rows": None}
    keys = [key_of(task="cola", **local)]
    for text in ["good\t1\nbad\t0", "good\t1\nbad\t1", "good\t1\nbat\t0"]:
        sst2.write_text(f"sentence\tlabel\n{text}\n")
        keys.append(key_of(task="sst2", **local))
    assert len(set(keys)) == 4


def only_folder(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.name != ".locks")
    return folder


def test_damaged_weights_are_refused_and_the_file_named(
    tune: Tune, tmp_path: Path
) -> None:
    tune()
    path = only_folder(tmp_path / "cache") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256") as error:
        tune()
    assert str(path) in str(error.value)


def test_a_damaged_record_is_refused_and_the_file_named(
    tune: Tune, tmp_path: Path
) -> None:
    tune()
    path = only_folder(tmp_path / "cache") / "record.json"
    good = json.loads(path.read_text())
    other = json.dumps(good | {"inputs": good["inputs"] | {"seed": 7}})
    incomplete = json.dumps({"inputs": good["inputs"]})
    for text in [path.read_text()[:-20], "", other, "{}", "[]", incomplete]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record\.json") as error:
            tune()
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"record\.json"):
        tune()


def test_the_environment_names_the_cache(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRONE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail(str(_[4])))
    with pytest.raises(pytest.fail.Exception) as error:
        tune(cache=None)
    assert str(tmp_path / "other") in str(error.value)


def test_bfloat16_is_used_in_training_and_nowhere_after_it(
    tune: Tune,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_bfloat16(monkeypatch, gains=False)
    wide = tune(cache=tmp_path / "wide")
    # emulated where the processor has no such products: slow, but the same numbers
    pretend_bfloat16(monkeypatch, gains=True)
    found = tune()
    again = retrain(
        found.model,
        batches.tokenize(
            data.sample(data.load("agreement")["train"], 16, 0), tokenizer, "agreement"
        ),
        tokenizer,
        recipe=RECIPE,
        cache=tmp_path / "cache",
    )
    assert not equal(weights(wide), weights(found))
    ids = torch.tensor([[101, 2023, 2003, 102]])
    for model in (found.model, again.model):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        plain = tiny(tokenizer, 2)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)


# --- interruptions ---------------------------------------------------------------


class CutOff(Exception):
    """In place of the user's Ctrl-C."""


class Steps(TrainerCallback):
    """Counts steps, and cuts the training off at the beginning of an epoch."""

    def __init__(self, cut_at: float) -> None:
        self.cut_at, self.steps = cut_at, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.epoch >= self.cut_at:
            raise CutOff

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Steps]:
    """From here on each Trainer gets this callback."""

    def watch(cut_at: float = np.inf) -> Steps:
        steps = Steps(cut_at)

        class Watched(CHECKED):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.add_callback(steps)

        monkeypatch.setattr(training, "CheckedTrainer", Watched)
        return steps

    return watch


def finished(cache: Path) -> list[str]:
    """What a later call would take for a result: all but checkpoints and locks."""
    names = (path.name for path in cache.iterdir())
    return [n for n in names if not n.endswith(".checkpoints") and n != ".locks"]


def test_a_training_that_was_cut_off_resumes_to_the_same_weights(
    tune: Tune, watch: Callable[..., Steps], tmp_path: Path
) -> None:
    through = watch()
    whole = tune(cache=tmp_path / "whole")
    assert through.steps == 6
    watch(cut_at=1)
    with pytest.raises(CutOff):
        tune()
    assert finished(tmp_path / "cache") == []
    torch.manual_seed(99)
    rest = watch()
    resumed = tune()
    assert rest.steps == 3  # the second epoch alone
    assert not resumed.cached and resumed.key == whole.key
    assert equal(weights(resumed), weights(whole))
    assert only_folder(tmp_path / "cache").name == whole.key[:20]


def test_a_training_that_failed_at_once_leaves_nothing_to_be_taken_for_a_result(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        with pytest.raises(CutOff):
            tune()
    assert finished(tmp_path / "cache") == []
    assert not tune().cached


def test_a_write_that_failed_half_way_leaves_nothing_to_be_taken_for_a_result(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_model", half)
        with pytest.raises(CutOff):
            tune()
    assert finished(tmp_path / "cache") == []
    assert not tune().cached


class Stop(BaseException):
    """In place of kill -9: nothing that catches an Exception sees it."""


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("at", [3, 6])
def test_a_checkpoint_cut_off_while_it_is_written_costs_an_epoch_and_blocks_nothing(
    tune: Tune,
    watch: Callable[..., Steps],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    at: int,
) -> None:
    whole = tune(cache=tmp_path / "whole")
    plain = getattr(Trainer, part)

    def die(self: Trainer, folder: str) -> None:
        if self.state.global_step == at:
            Path(folder, "optimizer.pt").write_bytes(b"half")
            raise Stop
        plain(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, part, die)
        with pytest.raises(Stop):
            tune()
    rest = watch()
    found = tune()
    assert rest.steps == 6 - (at - 3)  # from nothing, or from the first epoch's end
    assert equal(weights(found), weights(whole))


def test_a_training_stopped_after_its_last_checkpoint_needs_no_step_more(
    tune: Tune,
    watch: Callable[..., Steps],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tune(cache=tmp_path / "whole")

    def die(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training, "predict", die)  # what comes after the last step
        with pytest.raises(Stop):
            tune()
    rest = watch()
    found = tune()
    assert rest.steps == 0 and equal(weights(found), weights(whole))


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, -1, 6001])
def test_rows_out_of_range_are_refused(tune: Tune, rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows is {rows}; allowed are 1 to 6000"):
        tune(rows=rows)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("epochs", 0, "epochs is 0; at least 1"),
        ("epochs", -1, "epochs is -1"),
        ("epochs", 2.0, "epochs is 2.0; a whole number"),
        ("batch_size", True, "batch_size is True; a whole number"),
        ("batch_size", 0, "batch_size is 0; at least 1"),
        ("learning_rate", 0.0, "learning_rate is 0.0; a number above 0"),
        ("learning_rate", np.inf, "learning_rate is inf; a finite number"),
        ("learning_rate", "5e-5", "learning_rate is '5e-5'; a number"),
        ("warmup", 1.0, "warmup is 1.0; a share from 0 to below 1"),
        ("warmup", -0.1, "warmup is -0.1"),
        ("weight_decay", -1.0, "weight_decay is -1.0; a number from 0"),
        ("max_length", 2, "max_length is 2; at least 3"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_its_fields_name(
    field: str, value: Any, said: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        replace(RECIPE, **{field: value})


@pytest.mark.parametrize("task", ["wnli", "ptb"])
def test_an_unknown_task_is_refused(tune: Tune, task: str) -> None:
    with pytest.raises(ValueError, match=f"no task '{task}'; .*mrpc"):
        tune(task=task)


def test_a_score_is_learnt_with_a_single_output(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
    lines = ["\t".join([*header, "sentence1", "sentence2", "score"])]
    lines += ["\t".join(["x"] * 7 + ["a cat", "a " * i, f"{i}"]) for i in range(1, 5)]
    (tmp_path / "glue" / "STS-B").mkdir(parents=True)
    (tmp_path / "glue/STS-B/train.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("DRONE_DATA", str(tmp_path))
    found = tune(task="stsb", data_source="local", rows=None)
    assert found.model.config.num_labels == 1
    assert found.model.classifier.weight.isfinite().all()


# --- tokenize, predict, evaluate -------------------------------------------------

SENTENCES = [
    "the cat sings",
    "no",
    "a long row of some words here",
    "zebra",
    "a b",
]


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    plain = Dataset.from_dict({"sentence": SENTENCES, "label": [0, 1, 0, 1, 1]})
    return batches.tokenize(plain, tokenizer, "cola")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny(tokenizer, 2)


def test_tokenize_cuts_long_rows_and_pads_none(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = Dataset.from_dict(
        {
            "sentence1": ["a", "b " * 50],
            "sentence2": ["c d", "e " * 50],
            "label": [1, 0],
        }
    )
    found = batches.tokenize(plain, tokenizer, "mrpc", max_length=20)
    assert [len(ids) for ids in found["input_ids"]] == [6, 20]
    assert found["token_type_ids"][0] == [0, 0, 0, 1, 1, 1]
    assert found["labels"][:] == [1, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_batches_hold_every_row_once_shortest_first_with_few_pads(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    found = batches.batches(rows, tokenizer, batch_size)
    assert len(found) == -(-len(rows) // batch_size)
    unpadded = []
    for batch in found:
        assert set(batch) == set(rows.column_names) - {"labels"}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and len(ids) <= batch_size
        assert ids.shape[1] == mask.sum(1).max()  # as wide as its own longest row
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        unpadded += [
            row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)
        ]
    # sorted() is stable: rows of one length stay as they were
    assert unpadded == sorted(rows["input_ids"], key=len)


def test_batches_are_what_calibrate_takes_and_each_real_token_counts_once(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    moments = calibrate(model, batches.batches(rows, tokenizer, 2))
    tokens = sum(map(len, rows["input_ids"]))
    assert {moment.count for moment in moments.values()} == {tokens}


def test_no_rows_make_no_batches(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    none = rows.select([])
    for function in (batches.batches, partial(batches.predict, model)):
        with pytest.raises(ValueError, match="no rows"):
            function(none, tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_predict_keeps_the_order_of_the_rows(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> None:
    found = batches.predict(model, rows, tokenizer, batch_size)
    with torch.inference_mode():
        alone = [
            model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
            for text in SENTENCES
        ]
    assert found.shape == (5, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)
    assert len({tuple(row.round(6)) for row in found}) == 5  # the rows do differ


@pytest.mark.parametrize("mode", [True, False])
def test_predict_restores_the_mode_and_predicts_without_dropout(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    mode: bool,
) -> None:
    expected = batches.predict(model.eval(), rows, tokenizer)
    found = batches.predict(model.train(mode), rows, tokenizer)
    assert model.training is mode
    np.testing.assert_array_equal(found, expected)


def test_predict_refuses_logits_that_are_not_finite_and_names_the_row(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    zebra = tokenizer.convert_tokens_to_ids("zebra")
    model.bert.embeddings.word_embeddings.weight.data[zebra] = float("nan")
    with pytest.raises(ValueError, match="row 3: the logits are"):
        batches.predict(model.train(), rows, tokenizer)
    assert model.training


def test_evaluate_compares_predictions_with_the_rows_own_labels(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    said = batches.predict(model, rows, tokenizer).argmax(-1).tolist()
    right = rows.remove_columns("labels").add_column("labels", said)
    assert metrics.evaluate(model, right, tokenizer, "rte") == {"accuracy": 1.0}
    wrong = [said[0], *(1 - label for label in said[1:])]
    rows = rows.remove_columns("labels").add_column("labels", wrong)
    assert metrics.evaluate(model, rows, tokenizer, "rte") == {"accuracy": 0.2}


# --- metrics, by hand ------------------------------------------------------------


def logits(classes: list[int]) -> np.ndarray:
    return np.eye(3)[classes]


def score(task: str, outputs: np.ndarray, labels: list[float]) -> dict[str, float]:
    return {
        name: metric(outputs, np.array(labels))
        for name, metric in METRICS[task].items()
    }


def test_cola_is_scored_by_matthews_correlation() -> None:
    # 2 true positives, 1 true negative, 1 false positive, 1 false negative:
    # (2·1 - 1·1) / sqrt(3 · 3 · 2 · 2) = 1/6
    found = score("cola", logits([1, 1, 0, 1, 0]), [1, 1, 0, 0, 1])
    assert found == {"matthews": pytest.approx(1 / 6)}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_paraphrases_are_scored_by_accuracy_and_f1(task: str) -> None:
    # precision 2/3, recall 2/4, so F1 = 4/7; 2 + 1 right of 6
    found = score(task, logits([1, 1, 1, 0, 0, 0]), [1, 1, 0, 1, 1, 0])
    assert found == {"accuracy": pytest.approx(1 / 2), "f1": pytest.approx(4 / 7)}
    assert next(iter(found)) == "accuracy"


def test_stsb_is_scored_by_pearson_and_spearman() -> None:
    # Ranks agree but for one swap of neighbours: 1 - 6 · 2 / (4 · 15) = 0.8.
    # Deviations from the means 3 and 2: (-2, -1, 0, 3) and (-2, 0, -1, 3);
    # their product is 4 + 9 = 13, their squares sum to 14 each.
    outputs = np.array([[1.0], [2.0], [3.0], [6.0]])
    assert score("stsb", outputs, [0.0, 2.0, 1.0, 5.0]) == {
        "pearson": pytest.approx(13 / 14),
        "spearman": pytest.approx(0.8),
    }


@pytest.mark.parametrize("task", ["sst2", "mnli", "qnli", "rte", "agreement"])
def test_the_other_tasks_are_scored_by_accuracy(task: str) -> None:
    assert score(task, logits([0, 1, 2, 1]), [0, 1, 1, 0]) == {"accuracy": 0.5}


def test_every_task_has_a_metric() -> None:
    assert set(METRICS) == set(training.data.TASKS)


# --- retraining a compressed model -----------------------------------------------


@pytest.fixture
def small(model: PreTrainedModel) -> PreTrainedModel:
    """The model with one low-rank layer."""
    return compress(model, {"bert.encoder.layer.0.intermediate.dense": 4})


@pytest.fixture
def again(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., FineTuned]:
    def again(model: PreTrainedModel, **changes: Any) -> FineTuned:
        options = {"recipe": RECIPE, "cache": tmp_path / "cache"} | changes
        return retrain(model, options.pop("rows", rows), tokenizer, **options)

    return again


def test_labels_are_kept_when_asked_for_and_stay_with_their_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = [
        (row[real == 1].tolist(), label)
        for batch in batches.batches(rows, tokenizer, 2, labels=True)
        for row, real, label in zip(
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"].tolist(),
            strict=True,
        )
    ]
    given = list(zip(rows["input_ids"], rows["labels"], strict=True))
    assert sorted(pairs) == sorted(given)


def test_retraining_trains_the_thin_factors_of_a_copy(
    small: PreTrainedModel, again: Callable[..., FineTuned]
) -> None:
    before = {k: v.clone() for k, v in small.state_dict().items()}
    found = again(small)
    layer = found.model.bert.encoder.layer[0].intermediate.dense
    assert isinstance(layer, LowRankLinear) and layer.rank == 4
    assert not torch.equal(
        layer.left, small.bert.encoder.layer[0].intermediate.dense.left
    )
    assert equal(before, small.state_dict())  # the one given is left as it was
    assert not found.model.training and not found.cached


def test_retraining_is_cached_by_the_weights_it_starts_from_and_by_the_teacher(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    again: Callable[..., FineTuned],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, hit = again(small), again(small)
    assert hit.cached and equal(weights(first), weights(hit))
    assert "cache hit" in capsys.readouterr().out
    torch.manual_seed(1)
    teachers = [tiny(tokenizer, 2), tiny(tokenizer, 2)]
    other = copy.deepcopy(small)
    other.classifier.bias.data += 1
    found = [again(other), again(small, seed=1)]
    found += [again(small, teacher=teacher) for teacher in teachers]
    assert len({first.key, *(each.key for each in found)}) == 5
    assert not any(each.cached for each in found)


def test_a_learning_rate_of_next_to_nothing_changes_nothing(
    small: PreTrainedModel, again: Callable[..., FineTuned]
) -> None:
    recipe = Recipe(epochs=1, batch_size=2, learning_rate=1e-30)
    found, before = weights(again(small, recipe=recipe)), small.state_dict()
    assert all(torch.allclose(found[k], before[k], 0, 1e-29) for k in before)


@pytest.mark.parametrize("outputs", [2, 3, 1])
def test_a_student_comes_to_say_what_its_teacher_says_whatever_the_labels(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    again: Callable[..., FineTuned],
    outputs: int,
) -> None:
    teacher, student = tiny(tokenizer, outputs), tiny(tokenizer, outputs)
    teacher.classifier.weight.data *= 20  # clear opinions
    recipe = Recipe(epochs=40, batch_size=5, learning_rate=3e-3)
    found = again(student, teacher=teacher, recipe=recipe).model
    told, says, said = (
        batches.predict(m, rows, tokenizer) for m in (teacher, found, student)
    )
    if outputs > 1:  # a softmax forgives what all logits share
        told, says, said = (x - x.mean(1, keepdims=True) for x in (told, says, said))
    assert np.abs(says - told).max() < 0.2 * np.abs(said - told).max()


def test_frozen_parameters_and_the_config_are_part_of_the_key(
    small: PreTrainedModel, again: Callable[..., FineTuned]
) -> None:
    recipe = Recipe(epochs=1, batch_size=5, learning_rate=1e-3)
    first = again(small, recipe=recipe)
    small.bert.requires_grad_(False)
    found = again(small, recipe=recipe)
    word = "bert.embeddings.word_embeddings.weight"
    assert not found.cached and torch.equal(
        weights(found)[word], small.state_dict()[word]
    )
    assert not torch.equal(weights(first)[word], weights(found)[word])
    small.bert.requires_grad_(True)
    small.config.hidden_dropout_prob = 0.5  # the modules keep theirs; the key does not
    assert not again(small, recipe=recipe).cached


@pytest.mark.parametrize(("rate", "epochs"), [(1e30, 3), (1e30, 1), (1e38, 1)])
def test_a_training_that_diverged_is_an_error_each_time_and_never_a_hit(
    small: PreTrainedModel,
    again: Callable[..., FineTuned],
    tmp_path: Path,
    rate: float,
    epochs: int,
) -> None:
    """With one step in all, no loss is told after it: the logits are looked at."""
    recipe = Recipe(epochs, batch_size=5, learning_rate=rate, warmup=0.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"diverged|the logits are"):
            again(small, recipe=recipe)
    assert finished(tmp_path / "cache") == []


def test_logits_that_are_not_finite_and_no_rows_are_refused(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    small: PreTrainedModel,
    again: Callable[..., FineTuned],
) -> None:
    logits = batches.predict(small, rows, tokenizer)
    logits[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3: the teacher's outputs"):
        again(small, logits=logits)
    with pytest.raises(ValueError, match="no rows to train on"):
        again(small, rows=rows.select([]))


def test_a_teacher_with_other_outputs_is_refused(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    again: Callable[..., FineTuned],
) -> None:
    with pytest.raises(ValueError, match=r"the teacher has 3 outputs .* the model 2 "):
        again(small, teacher=tiny(tokenizer, 3))


def test_logits_given_are_the_same_as_their_teacher(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    small: PreTrainedModel,
    again: Callable[..., FineTuned],
) -> None:
    teacher = tiny(tokenizer, 2)
    logits = batches.predict(teacher, rows, tokenizer)
    by_teacher, by_logits = again(small, teacher=teacher), again(small, logits=logits)
    assert by_logits.key == by_teacher.key and by_logits.cached
    with pytest.raises(ValueError, match="give one of them"):
        again(small, teacher=teacher, logits=logits)
    with pytest.raises(ValueError, match="for 3 rows"):
        again(small, logits=logits[:3])


def test_the_loss_of_a_teacher_is_the_softened_cross_entropy() -> None:
    told, said = torch.tensor([[2.0, -1.0, 0.3]]), torch.tensor([[0.5, 0.0, 1.0]])
    p, q = (told / 2).softmax(1), (said / 2).softmax(1)
    by_hand = -4 * (p * q.log()).sum()
    assert torch.isclose(training.teacher_loss(said, told), by_hand)
    assert training.teacher_loss(told + 7, told) < by_hand  # the teacher's own is least
    mark = torch.tensor([[1.0], [3.0]])
    assert training.teacher_loss(mark + 2, mark) == 4  # one output: squares
    with pytest.raises(ValueError, match=r"\(1, 3\) .* \(2, 1\)"):
        training.teacher_loss(told, mark)


@pytest.mark.parametrize(("sign", "chosen"), [(1, 3e-3), (-1, 1e-30)])
def test_the_rows_kept_out_choose_the_rate(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    sign: int,
    chosen: float,
) -> None:
    """The same rows are taught and judge, by the same opinions or their opposite."""
    teacher, student = tiny(tokenizer, 2), tiny(tokenizer, 2)
    teacher.classifier.weight.data *= 20
    told = batches.predict(teacher, rows, tokenizer)
    rate = training.choose_rate(
        student,
        concatenate_datasets([rows, rows]),
        tokenizer,
        logits=np.concatenate([told, sign * told]),
        held=len(rows),
        rates=[1e-30, 3e-3],
        recipe=Recipe(epochs=20, batch_size=5),
        cache=tmp_path,
    )
    assert rate == chosen


@pytest.mark.parametrize(("held", "rates"), [(0, [1e-3]), (5, [1e-3]), (2, [])])
def test_a_choice_of_rates_that_makes_no_sense_is_refused(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    small: PreTrainedModel,
    held: int,
    rates: list[float],
) -> None:
    logits = batches.predict(small, rows, tokenizer)
    with pytest.raises(ValueError, match=r"rates, .* rows held back"):
        training.choose_rate(
            small, rows, tokenizer, logits=logits, held=held, rates=rates
        )
