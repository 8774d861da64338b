"""Latency: warmed up, interleaved, paired; robust on a machine that is busy."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import (
    LatencyReport,
    LowRankLinear,
    compare_latency,
    multiply_adds,
    profile_modules,
    timing,
)
from drone.timing import time_calls


class Model(nn.Module):
    """A linear layer that notes its calls, may wait, and may spoil its output."""

    def __init__(self, name: str, log: list[str], wait: float = 0.0) -> None:
        super().__init__()
        self.name, self.log, self.wait = name, log, wait
        self.linear = nn.Linear(4, 2)
        self.spoil: float | None = None
        self.fail_at: int | None = None
        self.threads: set[int] = set()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.threads.add(torch.get_num_threads())
        if self.fail_at == self.log.count(self.name):
            raise RuntimeError("on purpose")
        time.sleep(self.wait)
        y = self.linear(x)
        return y if self.spoil is None else y * self.spoil


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 4)}


def rounds(log: list[str], models: int) -> list[tuple[str, ...]]:
    """The order within each round, after the one check call of each model."""
    calls = log[models:]
    return [tuple(calls[i : i + models]) for i in range(0, len(calls), models)]


# --- what is refused -------------------------------------------------------------


def test_training_mode_is_refused_and_the_model_named(
    log: list[str], batch: dict[str, Tensor]
) -> None:
    models = {"base": Model("a", log), "thin": Model("b", log).train()}
    with pytest.raises(ValueError, match="thin is in training mode"):
        compare_latency(models, batch)
    assert not log


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_output_is_refused_and_the_model_named(
    log: list[str], batch: dict[str, Tensor], value: float
) -> None:
    models = {"base": Model("a", log), "thin": Model("b", log)}
    models["thin"].spoil = value
    with pytest.raises(ValueError, match="thin: the output has NaN or Inf"):
        compare_latency(models, batch)
    assert log == ["a", "b"]  # checked before anything is timed


def test_a_non_finite_tensor_is_found_in_a_models_named_outputs(
    tiny_bert: nn.Module, padded_batch: dict[str, Tensor]
) -> None:
    tiny_bert.classifier.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="bert: the output"):
        compare_latency({"bert": tiny_bert}, padded_batch)


def test_a_non_finite_tensor_is_found_inside_a_tuple() -> None:
    lstm = nn.LSTM(4, 3).eval()  # returns (output, (h, c))
    lstm.bias_ih_l0.data[0] = float("nan")
    with pytest.raises(ValueError, match="lstm: the output"):
        compare_latency({"lstm": lstm}, {"input": torch.randn(5, 2, 4)})


@pytest.mark.parametrize(
    ("repeats", "warmup"), [(1, 3), (0, 3), (-1, 3), (2, -1)], ids=str
)
def test_too_few_rounds_are_refused(
    log: list[str], batch: dict[str, Tensor], repeats: int, warmup: int
) -> None:
    with pytest.raises(ValueError, match="at least 2 and 0"):
        compare_latency({"a": Model("a", log)}, batch, repeats=repeats, warmup=warmup)


def test_no_model_and_no_batch_are_refused(
    log: list[str], batch: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match="at least one model"):
        compare_latency({}, batch)
    with pytest.raises(ValueError, match="at least one model"):
        compare_latency({"a": Model("a", log)}, {})


# --- rounds ----------------------------------------------------------------------


@pytest.mark.parametrize(("repeats", "warmup"), [(5, 2), (2, 0)])
def test_each_model_is_called_once_a_round_and_once_for_the_check(
    log: list[str], batch: dict[str, Tensor], repeats: int, warmup: int
) -> None:
    models = {name: Model(name, log) for name in "abc"}
    report = compare_latency(models, batch, repeats=repeats, warmup=warmup)
    assert all(log.count(name) == 1 + warmup + repeats for name in "abc")
    assert all(len(times) == repeats for times in report.seconds.values())
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds(log, 3))


def test_the_order_changes_from_round_to_round_and_the_seed_decides_it(
    batch: dict[str, Tensor],
) -> None:
    found = {}
    for run, seed in [("first", 0), ("again", 0), ("other", 1)]:
        log: list[str] = []
        models = {name: Model(name, log) for name in "abc"}
        compare_latency(models, batch, repeats=20, seed=seed)
        found[run] = rounds(log, 3)
    assert len(set(found["first"])) > 1
    assert {each[0] for each in found["first"]} == {"a", "b", "c"}
    assert found["first"] == found["again"] != found["other"]


def test_warm_up_rounds_are_not_measured(
    log: list[str], batch: dict[str, Tensor]
) -> None:
    class Cold(Model):
        def forward(self, x: Tensor) -> Tensor:
            cold = self.log.count(self.name) < 4  # the check and three warm-ups
            self.wait = 0.1 if cold else 0.0
            return super().forward(x)

    report = compare_latency({"a": Cold("a", log)}, batch, repeats=5, warmup=3)
    assert report.median("a") < 0.08


def test_no_gradients_are_recorded_while_timing(batch: dict[str, Tensor]) -> None:
    class Watch(Model):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            return super().forward(x)

    compare_latency({"a": Watch("a", [])}, batch, repeats=2)


# --- threads ---------------------------------------------------------------------


def test_threads_are_set_while_timing_and_restored(
    log: list[str], batch: dict[str, Tensor]
) -> None:
    before = torch.get_num_threads()
    model = Model("a", log)
    report = compare_latency({"a": model}, batch, repeats=2, threads=before + 1)
    assert model.threads == {before + 1} == {report.conditions["threads"]}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("call", [1, 3])
def test_threads_are_restored_when_a_model_fails(
    log: list[str], batch: dict[str, Tensor], call: int
) -> None:
    before = torch.get_num_threads()
    model = Model("a", log)
    model.fail_at = call
    with pytest.raises(RuntimeError, match="on purpose"):
        compare_latency({"a": model}, batch, threads=before + 1)
    assert model.threads == {before + 1}
    assert torch.get_num_threads() == before


# --- the ratio -------------------------------------------------------------------


def test_two_equal_models_are_not_told_apart() -> None:
    models = {name: nn.Sequential(nn.Linear(512, 512)).eval() for name in "ab"}
    models["b"].load_state_dict(models["a"].state_dict())
    intervals = []
    for seed in range(3):  # a 95 % interval misses 1 time in 20, and machines are busy
        report = compare_latency(
            models, {"input": torch.randn(64, 512)}, repeats=30, seed=seed
        )
        _, low, high = report.speedup("b")
        intervals.append((low, high))
        if low <= 1 <= high:
            return
    pytest.fail(f"no interval contains 1: {intervals}")


def test_a_model_five_times_as_slow_is_told_apart(batch: dict[str, Tensor]) -> None:
    models = {"slow": Model("a", [], wait=0.02), "fast": Model("b", [], wait=0.004)}
    ratio, low, high = compare_latency(models, batch, repeats=15).speedup("fast")
    assert 1.5 < low <= ratio <= high < 10


def test_the_ratio_is_the_median_of_paired_ratios() -> None:
    base, thin = np.array([1.0, 2.0, 9.0]), np.array([1.0, 8.0, 3.0])
    report = LatencyReport({"base": base, "thin": thin}, {})
    ratio, low, high = report.speedup("thin")
    assert ratio == 1.0  # of 1, 1/4 and 3; unpaired medians would give 2/3
    assert low == 0.25 and high == 3.0
    assert report.speedup("thin") == (ratio, low, high)
    assert report.speedup("base") == (1.0, 1.0, 1.0)


def test_a_lower_level_gives_a_narrower_interval() -> None:
    times = np.random.default_rng(0).uniform(1, 2, 40)
    report = LatencyReport({"base": np.ones(40), "thin": times}, {})
    _, low, high = report.speedup("thin", level=0.95)
    _, inner_low, inner_high = report.speedup("thin", level=0.5)
    assert low < inner_low < inner_high < high


def test_the_bootstrap_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        times = np.exp(rng.normal(0, 0.3, 30))  # the ratio's true median is 1
        report = LatencyReport({"base": np.ones(30), "thin": times}, {})
        _, low, high = report.speedup("thin")
        hits += low <= 1 <= high
    assert 88 <= hits <= 100


def test_table_has_a_row_a_model_in_milliseconds() -> None:
    report = LatencyReport(
        {"base": np.array([0.002, 0.004, 0.003]), "thin": np.full(3, 0.001)}, {}
    )
    table = report.table()
    assert list(table.index) == ["base", "thin"]
    assert list(table.columns) == ["median_ms", "speedup", "low", "high"]
    assert table.loc["base", "median_ms"] == pytest.approx(3)
    assert table.loc["thin", "speedup"] == pytest.approx(3)
    assert report.baseline == "base"


def test_conditions_say_what_was_timed(
    tiny_bert: nn.Module, padded_batch: dict[str, Tensor]
) -> None:
    found = compare_latency({"bert": tiny_bert}, padded_batch, repeats=2).conditions
    assert found.pop("processor")
    assert found == {
        "batch": 3,
        "length": 12,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "device": "cpu",
        "repeats": 2,
    }


# --- multiply-adds ---------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 6])
def test_multiply_adds_of_dense_and_thin_layers_are_exact(tokens: int) -> None:
    dense = nn.Linear(5, 7)
    thin = LowRankLinear.from_linear(dense, 2)
    batch = {"input": torch.randn(tokens, 5)}
    assert multiply_adds(nn.Sequential(dense), batch) == 35 * tokens
    assert multiply_adds(nn.Sequential(thin), batch) == 24 * tokens


def test_multiply_adds_count_a_batch_of_sequences() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert multiply_adds(model, {"input": torch.randn(2, 4, 5)}) == 8 * (35 + 21)


def test_attention_counts_the_same_fused_or_not(tiny_bert):
    # A token is compared with L others and averages L values, d wide: 2 L² d a layer.
    length, hidden, intermediate = 10, 32, 64
    ids = torch.ones(3, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counts = {}
    for kernel in ("sdpa", "eager"):
        tiny_bert.set_attn_implementation(kernel)
        counts[kernel] = multiply_adds(tiny_bert, batch)
    layer = length * (4 * hidden**2 + 2 * hidden * intermediate)
    heads = hidden**2 + 2 * hidden  # pooler and classifier see one token a row
    expected = 3 * (2 * (layer + 2 * length**2 * hidden) + heads)
    assert counts == {"sdpa": expected, "eager": expected}


def test_a_part_left_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match="odd is in training mode"):
        compare_latency({"odd": model}, {"input": torch.ones(2, 4)})


def test_a_list_of_models_is_refused_with_what_is_needed():
    with pytest.raises(TypeError, match="models is a list; a mapping is needed"):
        compare_latency([nn.Linear(2, 2)], {"input": torch.ones(1, 2)})


def test_a_batch_may_hold_what_is_no_tensor():
    class Model(nn.Linear):
        def forward(self, again, x):
            return super().forward(x)

    batch = {"again": True, "x": torch.ones(3, 2)}
    report = compare_latency({"a": Model(2, 2).eval()}, batch, repeats=2)
    assert report.conditions["batch"] == 3


def test_zero_threads_are_refused():
    with pytest.raises(ValueError, match="threads is 0"):
        compare_latency({"a": nn.ReLU().eval()}, {"input": torch.ones(2)}, threads=0)


def test_a_model_without_parameters_can_be_timed():
    timed = compare_latency({"a": nn.ReLU().eval()}, {"input": torch.ones(2, 3)}, 2)
    assert timed.conditions["dtype"] == "float32"


# --- plain calls -----------------------------------------------------------------


@pytest.mark.parametrize(("repeats", "warmup"), [(1, 3), (0, 0), (5, -1)], ids=str)
def test_too_few_rounds_of_calls_are_refused_before_any_is_made(
    log: list[str], repeats: int, warmup: int
) -> None:
    with pytest.raises(ValueError, match=f"repeats is {repeats} and warmup {warmup}"):
        time_calls({"a": lambda: log.append("a")}, repeats, warmup)
    assert not log


def test_each_call_is_made_once_a_round_and_the_warm_up_is_not_returned(
    log: list[str],
) -> None:
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    found = time_calls(calls, repeats=6, warmup=2)
    assert list(found) == ["a", "b", "c"]
    assert all(times.shape == (6,) and (times > 0).all() for times in found.values())
    orders = rounds(["", "", "", *log], 3)
    assert len(orders) == 8
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1


def test_a_call_takes_at_least_as_long_as_it_sleeps() -> None:
    calls = {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.002)}
    found = time_calls(calls, repeats=5, warmup=0)
    assert (found["long"] >= 0.02).all() and (found["short"] >= 0.002).all()
    assert np.median(found["short"]) < np.median(found["long"])


def test_a_model_compared_with_itself_is_as_fast() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).eval()
    intervals = []
    for seed in range(3):  # machines are busy
        batch = {"input": torch.randn(64, 256)}
        report = compare_latency({"a": model, "b": model}, batch, 40, seed=seed)
        ratio, low, high = report.speedup("b", level=0.99)
        assert low <= ratio <= high
        intervals.append((low, high))
        if low <= 1 <= high:
            return
    pytest.fail(f"no interval contains 1: {intervals}")


class FakeGPU:
    """The parts of `torch.cuda` that a clock needs: a counter of queued work, in ms."""

    def __init__(self, patch: pytest.MonkeyPatch, log: list[str]) -> None:
        gpu, self.log, self.queued = self, log, 0.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing  # else the real one would raise
                self.at, self.reached = 0.0, False

            def record(self, stream: object) -> None:
                assert stream == "stream of cuda:1"
                log.append("record")
                self.at = gpu.queued

            def synchronize(self) -> None:
                log.append("reached")
                self.reached = True

            def elapsed_time(self, end: "Event") -> float:
                assert end.reached  # else the real one would raise
                return end.at - self.at

        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_stream", lambda d: f"stream of {d}")
        patch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
        patch.setattr(torch.cuda, "Event", Event)

    def work(self, milliseconds: float) -> None:
        """Queue work; the CPU goes on at once."""
        self.log.append("call")
        self.queued += milliseconds


GPU, CPU = torch.device("cuda:1"), torch.device("cpu")


def test_on_a_gpu_its_own_clock_counts_and_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    gpu = FakeGPU(monkeypatch, log)
    calls = {"a": lambda: gpu.work(250)}
    found = time_calls(calls, repeats=3, warmup=1, devices={"a": GPU})
    assert found["a"].tolist() == [0.25, 0.25, 0.25]
    assert log == ["wait", "record", "call", "record", "reached"] * 4


def test_a_call_on_the_cpu_waits_for_no_gpu_and_one_of_unknown_place_does(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    gpu = FakeGPU(monkeypatch, log)
    calls = {"a": lambda: gpu.work(250)}
    found = time_calls(calls, repeats=2, warmup=0, devices={"a": CPU})
    assert (found["a"] < 0.25).all() and log == ["call"] * 2
    log.clear()
    time_calls(calls, repeats=2, warmup=0)
    assert log == ["wait", "wait", "call", "wait"] * 2


def test_a_model_on_the_cpu_is_timed_there_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, log: list[str], batch: dict[str, Tensor]
) -> None:
    FakeGPU(monkeypatch, log)
    compare_latency({"a": Model("a", log)}, batch, repeats=2, warmup=0)
    profile_modules(Model("a", log), batch, repeats=2, warmup=0)
    assert set(log) == {"a"}


def test_each_model_gets_the_batch_where_it_is_and_that_devices_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def count(calls: Any, *_: Any) -> dict[str, np.ndarray]:
        seen.append(
            {n: call.keywords["input"].device.type for n, call in calls.items()}
        )
        seen.append({name: device.type for name, device in _[-1].items()})
        return {name: np.ones(2) for name in calls}

    monkeypatch.setattr(timing, "time_calls", count)
    monkeypatch.setattr(timing, "_check_finite", lambda *_: None)
    models = {d: nn.Linear(4, 2, device=d).eval() for d in ("cpu", "meta")}
    compare_latency(models, {"input": torch.ones(3, 4)}, repeats=2)
    assert seen == [{"cpu": "cpu", "meta": "meta"}] * 2


def test_on_a_gpu_a_profile_waits_for_nothing_within_a_pass_and_shares_add_up(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    gpu = FakeGPU(monkeypatch, log)
    monkeypatch.setattr(timing, "clock_of", lambda *_: GPU)

    class Working(nn.Module):
        def __init__(self, own: float, **parts: nn.Module) -> None:
            super().__init__()
            self.own = own
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            gpu.work(self.own / 2)
            for part in self.children():
                x = part(x)
            gpu.work(self.own / 2)
            return x

    model = Working(4, a=Working(8, b=Working(16)), c=Working(4)).eval()
    table = profile_modules(model, {"x": torch.ones(1)}, repeats=2, warmup=0)
    assert table["milliseconds"].to_dict() == {"Working": 4, "a": 8, "a.b": 16, "c": 4}
    assert table["share"].to_dict() == {
        "Working": 1 / 8, "a": 1 / 4, "a.b": 1 / 2, "c": 1 / 8
    }  # fmt: skip
    # Between the first and the last call of a pass nothing is waited for.
    words = "".join({"wait": "w", "reached": "w"}.get(each, ".") for each in log)
    assert all(len(part) in (0, 10, 18) for part in words.split("w")), words


# --- by kind of module -----------------------------------------------------------


class Sleeper(nn.Module):
    """Sleeps a known time of its own, and then runs its parts."""

    def __init__(self, own: float, **parts: nn.Module) -> None:
        super().__init__()
        self.own = own
        for name, part in parts.items():
            self.add_module(name, part)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.own)
        for part in self.children():
            layers = part if isinstance(part, nn.ModuleList) else [part]
            for layer in layers:
                x = layer(x)
        return x


def sleeping() -> Sleeper:
    """36 ms: 4 of its own, and of each of two layers 8, of their parts 6 and 2."""
    layers = [
        Sleeper(0.008, dense=Sleeper(0.006), part2=Sleeper(0.002)) for _ in range(2)
    ]
    return Sleeper(0.004, layer=nn.ModuleList(layers))


def test_the_profile_says_where_the_time_goes_by_kind() -> None:
    model, batch = sleeping(), {"x": torch.ones(1)}
    expected = {
        "Sleeper": (1, 4),
        "layer.*": (2, 16),
        "layer.*.dense": (2, 12),
        "layer.*.part2": (2, 4),
    }
    found = []
    for _ in range(3):  # sleeps are never shorter, and on a busy machine longer
        table = profile_modules(model, batch, repeats=5, warmup=1)
        assert list(table.index) == list(expected)  # as they first run
        assert list(table.columns) == ["calls", "milliseconds", "share"]
        own = {kind: milliseconds for kind, (_, milliseconds) in expected.items()}
        assert table["calls"].to_dict() == {k: n for k, (n, _) in expected.items()}
        assert all(table["milliseconds"][kind] >= own[kind] for kind in own)
        close = all(table["milliseconds"][kind] < 1.25 * own[kind] + 1 for kind in own)
        shares = table["share"].sum()
        found.append((table["milliseconds"].to_dict(), shares))
        if close and abs(shares - 1) < 0.05:
            ratios = table["milliseconds"] / table["share"]
            assert ratios.max() == pytest.approx(ratios.min())  # of one whole
            return
    pytest.fail(f"no profile was near the times slept: {found}")


def test_only_numbers_in_names_become_stars_and_layers_are_counted(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    table = profile_modules(tiny_bert, padded_batch, repeats=2, warmup=0)
    calls = table["calls"].to_dict()
    assert list(calls)[:2] == ["BertForSequenceClassification", "bert"]
    assert calls["bert.encoder.layer.*"] == 2
    assert calls["bert.encoder.layer.*.attention.self.query"] == 2
    assert calls["bert.encoder"] == calls["classifier"] == 1
    assert "bert.encoder.layer" not in calls  # a list is never called
    assert (table["milliseconds"] >= 0).all() and (table["share"] >= 0).all()


def test_a_module_called_twice_a_pass_is_counted_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a1 = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            return self.a1(self.a1(x))

    table = profile_modules(Twice().eval(), {"x": torch.ones(1, 2)}, repeats=2)
    assert table["calls"].to_dict() == {"Twice": 1, "a1": 2}


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()
    )


@pytest.mark.parametrize("at", [None, 1, 2, 5])
def test_the_profile_leaves_no_hook_even_if_a_pass_fails(
    log: list[str], batch: dict[str, Tensor], at: int | None
) -> None:
    model = Model("a", log)
    model.fail_at = at
    if at is None:
        profile_modules(model, batch, repeats=2)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            profile_modules(model, batch, repeats=2)
    assert hooks(model) == 0


def test_passes_without_hooks_run_in_between() -> None:
    seen: list[int] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(hooks(self))
            return x

    profile_modules(Watch().eval(), {"x": torch.ones(1)}, repeats=4, warmup=1)
    pairs = [sorted(seen[i : i + 2]) for i in range(0, len(seen), 2)]
    assert pairs == [[0, 2]] * 5


def test_warm_up_passes_are_not_in_the_profile() -> None:
    class Cold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            time.sleep(0.1 if self.passes <= 6 else 0)
            return x

    table = profile_modules(Cold().eval(), {"x": torch.ones(1)}, repeats=3, warmup=3)
    assert table.loc["Cold", "milliseconds"] < 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.linear.train(), r"training mode; call its eval\(\) first"),
        (lambda model: None, "repeats is 1 and warmup 2; at least 2 and 0"),
    ],
    ids=["training", "rounds"],
)
def test_a_profile_that_would_mislead_is_refused(
    log: list[str],
    batch: dict[str, Tensor],
    change: Callable[[nn.Module], object],
    message: str,
) -> None:
    model = Model("a", log)
    change(model)
    with pytest.raises(ValueError, match=message):
        profile_modules(model, batch, repeats=1)
    assert not log and hooks(model) == 0
