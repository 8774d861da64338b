"""The job of chapter 7 on a tiny encoder: parts, dev, rates, cases."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from drone.lab import data, encoders, formats, glue, glue_job, loop
from drone.lab.arms import Arm
from drone.lab.cases import keep_case, read_cases, unpack
from drone.lab.clocks import FORMATS
from drone.lab.exam import examine, with_test
from drone.lab.formats import score, served
from drone.lab.glue import Bench, settings_of
from drone.lab.glue_read import studies
from drone.lab.ladder import AS_IS, Judged, best_of
from drone.lab.tables import Estimate
from drone.lab.training import Recipe
from tests.lab.test_methods import make_speeds

METHODS = ("drone-latency", "svd-fraction", "first-layers")


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random encoder of 6 thin layers with MiniLM's words."""
    real = encoders.encoder("minilm")[1]

    def encoder(name: str, source: str, num_labels: int, seed: int) -> Any:
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(real),
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=128,
            num_labels=num_labels,
        )
        return BertForSequenceClassification(config).eval(), real

    monkeypatch.setattr(encoders, "encoder", encoder)
    monkeypatch.setattr(loop, "bfloat16_gains", lambda: False)
    monkeypatch.setattr(glue, "bfloat16_gains", lambda: False)


def make_bench(store: Path, **changes: Any) -> Bench:
    settings = settings_of(
        "minilm",
        "agreement",
        0,
        Recipe(epochs=1, batch_size=16, learning_rate=1e-3),
        data_source="embedded",
        rows=120,
        dev_rows=30,
        **changes,
    )
    model, _ = encoders.encoder("minilm", "embedded", 2, 0)
    return Bench(
        settings, make_speeds(model), store, store / "weights", torch.device("cpu")
    )


def results(store: Path) -> list[dict[str, Any]]:
    jobs = ("dense", "ranks", "retrain")
    return [case.result for job in jobs for case in read_cases(store, job)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Room for a run that several tests look at."""
    return [tmp_path_factory.mktemp("store")]


@pytest.fixture
def store(finished: list[Path], capsys: pytest.CaptureFixture[str]) -> Path:
    folder = finished[0]
    glue_job.run(make_bench(folder), [1.5], METHODS, ("none", "paper", "0.5x1"))
    return folder


def test_a_finished_case_is_not_repeated(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(results(store)) == 1 + 3 + 9

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished case ran again")

    monkeypatch.setattr(glue, "train", never)
    monkeypatch.setattr(glue.Methods, "find", never)
    capsys.readouterr()
    glue_job.run(make_bench(store), [1.5], METHODS, ("none", "paper", "0.5x1"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 13 and all("(found)" in line for line in said)


def test_a_fitted_search_looks_at_fit_rows_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(tmp_path)
    seen = {}

    def find(self: glue.Methods, method: str, *_: Any) -> dict[str, Any]:
        seen[method] = self.batches
        names = list(bench.speeds.costs.modules)
        return {"ranks": {names[-1]: 4}, "speedup": 1.5, "weights_share": 0.9}

    monkeypatch.setattr(glue.Methods, "find", find)
    for method in ("drone-algorithm2", "drone-algorithm2-fitted"):
        case = bench.ranks(method, 1.5)
        assert case.settings["first_budget"] == 0.15
        assert case.result["calibration_loss"] > 0
    parts = (bench.split.calibration, bench.split.fit)
    rows = [bench._corpus[0].select(part) for part in parts]
    for batches, part in zip(seen.values(), rows, strict=True):
        found = torch.cat([batch["labels"] for batch in batches])
        assert len(found) == len(bench.split.calibration)
        known = {tuple(ids[ids > 0].tolist()) for ids in part.inputs["input_ids"]}
        for batch in batches:
            for ids in batch["input_ids"]:
                assert tuple(ids[ids > 0].tolist()) in known


def test_a_stopped_job_goes_on_where_it_was(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {p.name: p.read_text() for p in (store / "retrain").glob("*.json")}
    again = tmp_path / "again"
    shutil.copytree(store, again)
    gone = sorted((again / "retrain").glob("*.json"))[4]
    gone.unlink()
    runs: list[str] = []
    real = Bench._retrain

    def counted(self: Bench, settings: Any, arm: Arm) -> Any:
        runs.append(settings["method"])
        return real(self, settings, arm)

    monkeypatch.setattr(Bench, "_retrain", counted)
    glue_job.run(make_bench(again), [1.5], METHODS, ("none", "paper", "0.5x1"))
    assert len(runs) == 1
    new = json.loads(gone.read_text())["result"]
    assert new == json.loads(whole[gone.name])["result"]  # and to the same numbers


def test_the_same_rates_are_offered_to_every_arm(store: Path) -> None:
    trained = [c for c in read_cases(store, "retrain") if c.settings["arm"]["share"]]
    assert len(trained) == 6
    offered = {(*c.settings["rates"], *c.settings["first"]) for c in trained}
    assert len(offered) == 1
    for case in trained:
        tried = {
            rate: Judged(score, loss)
            for rate, score, loss in case.result["rates"]
            if score is not None
        }
        assert {AS_IS, *case.settings["first"]} <= set(tried)
        assert case.result["rate"] == best_of(tried)
        # what is reported is that model, not the last one trained
        assert case.result["held"]["accuracy"] == tried[case.result["rate"]].score
        ends = (AS_IS, min(case.settings["rates"]), max(case.settings["rates"]))
        if case.result["rate"] not in ends:
            assert min(tried) < case.result["rate"] < max(tried)


def test_retraining_that_only_harms_leaves_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a smaller loss won: models that say the commonest label."""
    bench = make_bench(tmp_path)
    was = bench.retrain("drone-latency", 1.5, "none")

    def spoil(model: Any, *_: Any) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()  # one answer for all rows; the loss falls to ln 2

    bench.dense()
    monkeypatch.setattr(glue, "train", spoil)
    now = bench.retrain("drone-latency", 1.5, "paper")
    (_, score, _), *others = now.result["rates"]
    assert score > others[0][1]  # the test is about something
    assert now.result["rate"] == AS_IS
    assert now.result["dev_logits"] == was.result["dev_logits"]


def test_development_rows_do_nothing_but_report(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench._corpus.func

    def turned(self: Bench) -> Any:
        train, dev = real(self)
        return train, glue.Rows(dev.inputs, dev.lengths, 1 - dev.labels)

    corpus = glue.cached_property(turned)
    corpus.__set_name__(Bench, "_corpus")
    monkeypatch.setattr(Bench, "_corpus", corpus)
    glue_job.run(make_bench(tmp_path), [1.5], METHODS, ("none", "paper", "0.5x1"))
    was, now = results(store), results(tmp_path)
    assert len(was) == len(now)
    for a, b in zip(was, now, strict=True):
        if "dev" in a:
            assert a.pop("dev")["accuracy"] == pytest.approx(
                100 - b.pop("dev")["accuracy"]
            )
        for clock in ("seconds", "measured_seconds"):
            a.pop(clock, None), b.pop(clock, None)
        assert a == b


def test_calibration_rows_and_held_rows_are_never_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(tmp_path)
    seen: list[torch.Tensor] = []
    real = loop.train

    def watched(model: Any, rows: Any, *rest: Any) -> None:
        seen.append(rows.inputs["input_ids"])
        real(model, rows, *rest)

    monkeypatch.setattr(glue, "train", watched)
    glue_job.run(bench, [1.5], ["first-layers"], ["paper", "0.5x1"])
    ids = bench._corpus[0].inputs["input_ids"]
    fitted = {tuple(row.tolist()) for rows in seen for row in rows}
    parts = np.concatenate([bench.split.calibration, bench.split.held])
    texts = {tuple(row.tolist()) for row in ids}
    assert len(texts) == len(ids)  # no sentence is there twice
    assert len(seen) > 2 and fitted == {tuple(ids[i].tolist()) for i in bench.split.fit}
    assert not fitted & {tuple(ids[i].tolist()) for i in parts}
    calibration = sum(len(batch["labels"]) for batch in bench.calibration)
    assert calibration == len(bench.split.calibration) == 12


def test_logits_are_kept_with_the_scores_they_give(store: Path) -> None:
    bench = make_bench(store)
    for result in results(store):
        if "dev" in result:
            logits = torch.tensor(unpack(result["dev_logits"]).astype(np.float32))
            assert bench.scores(logits, bench._corpus[1].labels) == result["dev"]


def test_missing_and_foreign_weights_are_told(store: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(store, again)
    (file,) = (again / "weights").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        _ = make_bench(again).model
    file.unlink()
    with pytest.raises(FileNotFoundError, match="delete the case"):
        _ = make_bench(again).model


def test_a_rate_may_be_taken_from_another_seed(store: Path) -> None:
    bench = make_bench(store)
    rate = bench.rate_of_seed(0, "svd-fraction", 1.5, "paper")
    case = bench.retrain("svd-fraction", 1.5, "paper", rate)
    assert case.settings["rates"] == [rate] and case.result["rate"] == rate
    chosen = bench.retrain("svd-fraction", 1.5, "paper").result
    assert case.result["dev_logits"] == chosen["dev_logits"]
    with pytest.raises(ValueError, match="run that seed first"):
        bench.rate_of_seed(7, "svd-fraction", 1.5, "paper")


def test_a_model_is_scored_in_each_format(store: Path) -> None:
    bench = make_bench(store)
    glue_job.run(bench, [1.5], ["drone-latency"], (), forms=list(FORMATS))
    dense, small = bench.dense(), bench.retrain("drone-latency", 1.5, "none")
    plain = score(bench, "drone-latency", 1.5, "float32").result
    assert plain["dev_logits"] == small.result["dev_logits"]
    points = dense.result["dev"]["accuracy"] - small.result["dev"]["accuracy"]
    assert plain["lost"][0] == pytest.approx(points)
    assert plain["bytes"] == 4 * bench.ranks("drone-latency", 1.5).result["parameters"]
    eight = score(bench, "drone-latency", 1.5, "int8").result
    assert (
        eight["bytes"] < plain["bytes"] and eight["dev_logits"] != plain["dev_logits"]
    )
    assert plain["uneven"] is None and isinstance(eight["uneven"], float)
    assert eight["plan"] == plain["plan"] | {"format": "int8"}
    whole = score(bench, "dense", 1.0, "float32").result
    assert whole["lost"] == [0, 0, 0] and whole["plan"] == {"format": "float32"}
    with pytest.raises(ValueError, match="no format 'int4'"):
        score(bench, "dense", 1.0, "int4")


def test_what_is_served_is_the_score_and_every_clock_of_it(store: Path) -> None:
    glue_job.run(make_bench(store), [1.5], ["drone-latency"], (), forms=list(FORMATS))
    with pytest.raises(ValueError, match="no clock that timed them all"):
        served(store, "minilm", "agreement")
    cases = read_cases(store, "formats")
    plans = {formats.name_of(case): case.result["plan"] for case in cases}
    speeds = {name: [1.5 + i, 1.0, 9.0] for i, name in enumerate(plans)}
    for threads, timed in ((1, plans), (2, {"other": {}} | plans), (4, {})):
        settings = {"encoder": "minilm", "threads": threads, "plans": timed}
        settings |= {"batch": 8, "length": 9, "rounds": 20, "processes": 5}
        settings["processor"] = "any"
        keep_case(store, "clocks", settings, {"speedups": speeds}, 1.0)
    found = served(store, "minilm", "agreement")
    assert [(each.method, each.form) for each in found] == [
        ("dense", "float32"),
        ("dense", "int8"),
        ("drone-latency", "float32"),
        ("drone-latency", "int8"),
    ]
    for each, case in zip(found, sorted(cases, key=formats.name_of), strict=True):
        assert each.lost == Estimate(*case.result["lost"])
        assert each.megabytes == case.result["bytes"] / 1e6
        measured = Estimate(*speeds[formats.name_of(case)])
        assert each.faster == {1: measured, 2: measured}
    again = {"encoder": "minilm", "threads": 2, "plans": plans, "batch": 32}
    again |= {"length": 9, "rounds": 20, "processes": 5, "processor": "any"}
    path = keep_case(store, "clocks", again, {"speedups": speeds}, 1.0).path
    with pytest.raises(ValueError, match="more than one way"):
        served(store, "minilm", "agreement")
    path.unlink()
    told = formats.record(store, "minilm", "agreement")
    (store / "served.json").write_text(json.dumps(told))
    del told["models"]
    assert told["rows"] == 30
    assert formats.read(store / "served.json") == (told, found)


def copied(store: Path, to: Path) -> Path:
    """A copy of the store, without what other tests have run besides."""
    again = to / "again"
    shutil.copytree(store, again)
    for case in read_cases(again, "retrain"):
        if len(case.settings["rates"]) == 1:
            case.path.unlink()
    return again


def test_what_is_examined_is_the_finished_model(store: Path, tmp_path: Path) -> None:
    again = copied(store, tmp_path)
    before = len(results(again))
    arms = ("none", "paper", "0.5x1")
    glue_job.run(make_bench(again), [1.5], METHODS, arms, exam=True)
    bench = make_bench(again)
    assert len(list((again / "exam").glob("*.json"))) == 1 + 9
    assert len(results(again)) == before, "nothing else was run"
    test = data.load("agreement", splits=["test"])["test"]
    rates = set()
    for method, name in product(METHODS, arms):
        kept = bench.retrain(method, 1.5, name).result
        found = examine(bench, method, 1.5, name)
        assert found.found
        rates.add(kept["rate"])
        logits = unpack(found.result["test_logits"])
        right = 100 * (logits.argmax(1) == np.array(test["label"])).mean()
        assert right == pytest.approx(found.result["test"]["accuracy"])
    assert len(rates) > 2, "some were retrained, at more than one rate"


def test_a_model_that_does_not_come_out_again_is_not_examined(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = copied(store, tmp_path)
    bench = make_bench(again)
    real = Bench.retrained

    def otherwise(self: Bench, method: str, speedup: float, *_: Any) -> Any:
        return real(self, method, speedup, Arm.named("paper"), 1e-2)

    monkeypatch.setattr(Bench, "retrained", otherwise)
    with pytest.raises(ValueError, match="made again, the model says something else"):
        examine(bench, "drone-latency", 1.5, "none")
    assert not list((again / "exam").glob("*.json"))


def test_a_study_with_test_rows_holds_what_was_examined(
    store: Path, tmp_path: Path
) -> None:
    again = copied(store, tmp_path)
    study = studies(again, "embedded", 1.5)["minilm", "agreement"]
    assert with_test(study, again, "embedded").dense == {}
    bench, key = make_bench(again), ("drone-latency", "paper")
    examine(bench, "dense")
    examine(bench, key[0], 1.5, key[1])
    both = with_test(study, again, "embedded")
    assert list(both.arms) == [key] and list(both.dense) == [0]
    test = data.load("agreement", splits=["test"])["test"]
    assert len(both.labels) == 30 + len(test)
    rows = {None: both.dense[0], key: both.arms[key][0]}
    right = {}
    for of, case in rows.items():
        logits = both.logits(of, [0])[0]
        assert (logits[:30] == study.logits(of, [0])[0]).all()
        right[of] = 100 * (logits.argmax(1) == both.labels).mean()
        assert case.result["dev"]["accuracy"] == pytest.approx(right[of])
    assert both.score == pytest.approx(right[None])
    assert both.lost(key).value == pytest.approx(right[None] - right[key])


def test_amounts_of_retraining_have_names() -> None:
    assert Arm.named("paper") == Arm(0.1, 1, False)
    assert Arm.named("1x10") == Arm(1.0, 10, True)
    for wrong in ("much", "2x1", "0.1x0", "0x3", "x"):
        with pytest.raises(ValueError, match="no retraining"):
            Arm.named(wrong)


def test_the_command_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ["--encoder", "minilm", "--task", "mrpc", "--speeds", "x", "--store", "y"]
    for more, message in [
        (["--methods", "magic"], "no method 'magic'"),
        (["--arms", "much"], "no retraining 'much'"),
        (["--formats", "int4"], "no format 'int4'"),
        (["--task", "qqp"], "no recipe"),
    ]:
        with pytest.raises(SystemExit):
            glue_job.main([*usual, *more])
        assert message in capsys.readouterr().err
