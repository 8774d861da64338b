"""The LSTM's fast training, reading and thinning, against the library's plain ways."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drone
from drone.lab import language, lstm_train
from drone.lab.cases import read_cases, unpack
from drone.lab.lstm_job import stages
from drone.lab.lstm_model import LSTMConfig, LSTMLanguageModel
from drone.lab.lstm_read import BLOCKS, by_band, compared, mean_losses, read_texts
from drone.lab.lstm_step import Parts, Step, checked_step, multiplied, parts_of
from drone.lab.lstm_study import Study, chosen_rate
from drone.lab.lstm_thin import (
    KINDS,
    balanced,
    factorize_all,
    names_of,
    thinned,
    weights_of,
)
from drone.lab.lstm_train import (
    SIZES,
    Recipe,
    draw,
    load_parts,
    prepare,
    save_parts,
    train,
)

WORDS, HIDDEN = 60, 16


def model_of(dropout: float = 0.0, hidden: int = HIDDEN) -> LSTMLanguageModel:
    config = LSTMConfig(vocab_size=WORDS, hidden_size=hidden, dropout=dropout)
    model = language.language_model(config, 3)
    for parameter in model.parameters():  # lively: no bias of 0, no flat softmax
        nn.init.normal_(parameter, std=0.4)
    return model


def text(tokens: int, seed: int = 0, used: int = WORDS) -> Tensor:
    """A text in which each word is nearly known from the one before."""
    draws = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, generator=draws) < 0.3
    words = [0]
    for n in range(tokens - 1):
        other = int(torch.randint(used, (), generator=draws))
        words.append(other if noise[n] else (words[-1] * 7 + 3) % used)
    return torch.tensor(words)


def thin_parts(model: LSTMLanguageModel, rank: int = 5) -> tuple[Parts, nn.Module]:
    """The same thin model twice: as parts, and as the library makes it."""
    names = list(drone.encoder_linears(model))
    small = drone.compress(model, dict.fromkeys(names, rank))
    parts = parts_of(model, "cpu")
    for name in names:
        module = small.get_submodule(name)
        parts[f"{name}.weight"] = (module.left.detach(), module.right.detach())
    return {n: tuple(f.clone() for f in fs) for n, fs in parts.items()}, small


def plain_steps(
    model: nn.Module, cut: list[tuple[Tensor, Tensor]], rate: float, clip: float
) -> list[float]:
    """Steps as any textbook makes them."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses, states = [], None
    for before, labels in cut:
        output = model(before, labels, states=states)
        states = [(h.detach(), c.detach()) for h, c in output.states]
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return losses


# --- a step ----------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.1, 1e3])
def test_a_step_is_the_textbook_one(clip: float) -> None:
    model = model_of()
    cut = list(language.windows(text(400), 4, 20))
    step = Step(model, parts_of(model, "cpu"), (4, 20), clip, "float32")
    step.start()
    losses, before = [], 0.0
    for window in cut:
        step.rate.fill_(0.7)
        step(*window)
        losses.append(float(step.total) - before)
        before = float(step.total)
    counts = [int((labels >= 0).sum()) for _, labels in cut]
    ours = [loss / count for loss, count in zip(losses, counts, strict=True)]
    theirs = copy.deepcopy(model)
    assert ours == pytest.approx(plain_steps(theirs, cut, 0.7, clip), rel=1e-5)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(step.parts[name][0], weight, rtol=1e-4, atol=1e-6)
    assert float(step.count) == sum(counts)


def test_a_thin_step_moves_both_factors_as_thin_layers_do() -> None:
    model = model_of()
    parts, small = thin_parts(model)
    cut = list(language.windows(text(300), 3, 20))
    step = Step(model, parts, (3, 20), 0.5, "float32")
    for window in cut:
        step.rate.fill_(0.7)
        step(*window)
    plain_steps(small, cut, 0.7, 0.5)
    for name in drone.encoder_linears(model):
        module = small.get_submodule(name)
        left, right = step.parts[f"{name}.weight"]
        torch.testing.assert_close(left, module.left, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(right, module.right, rtol=1e-4, atol=1e-5)


def test_a_window_that_is_shorter_counts_only_its_own_words() -> None:
    model = model_of()
    before, labels = next(language.windows(text(80), 4, 20))
    short, long = (
        Step(model, parts_of(model, "cpu"), (4, steps), 1.0, "float32")
        for steps in (13, 20)
    )
    for step in (short, long):
        step.rate.fill_(0.3)
        step(before[:, :13], labels[:, :13])
    assert float(long.count) == 4 * 13
    assert float(long.total) == pytest.approx(float(short.total), rel=1e-6)


def test_parts_and_precision_that_do_not_fit_are_refused() -> None:
    model = model_of()
    parts = parts_of(model, "cpu")
    with pytest.raises(ValueError, match="bfloat16"):
        Step(model, parts, (2, 5), 1.0, "bfloat16")
    with pytest.raises(ValueError, match="float16"):
        Step(model, parts, (2, 5), 1.0, "float16")
    del parts["embedding.weight"]
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        Step(model, parts, (2, 5), 1.0, "float32")


# --- what is captured is checked -------------------------------------------------


class Playing:
    """Stands for a CUDA graph: plays a step, rightly or not."""

    def __init__(self, step: Step, fault: str) -> None:
        self.step, self.fault = step, fault

    def replay(self) -> None:
        if self.fault == "frozen masks":
            torch.manual_seed(1)
        self.step._run()
        if self.fault == "stale windows":
            self.step.total += 1.0


def capture_with(fault: str) -> Any:
    def capture(self: Step) -> None:
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph = Playing(self, fault)  # type: ignore[assignment]

    return capture


@pytest.mark.parametrize(
    ("fault", "captured", "why"),
    [
        ("", True, None),
        ("refused", False, "not permitted"),
        ("stale windows", False, "not the losses"),
        ("frozen masks", False, "masks are frozen"),
    ],
)
def test_a_captured_step_is_taken_only_if_it_is_right(
    monkeypatch: pytest.MonkeyPatch, fault: str, captured: bool, why: str | None
) -> None:
    monkeypatch.setattr(Step, "capture", capture_with(fault))
    model = model_of(dropout=0.3).train()
    parts = parts_of(model, "cpu")
    cut = list(language.windows(text(400), 4, 20))
    step, report = checked_step(model, parts, cut, 1.0, "float32", capture=True)
    assert (step.graph is not None) == report["captured"] == captured
    assert report["asked"] == {"precision": "float32", "captured": True}
    assert (why is None) == (report["failed"] == [])
    assert why is None or why in report["failed"][0]
    for name, weight in model.state_dict().items():  # left as they were
        assert torch.equal(parts[name][0], weight)
    assert all(float(state.abs().sum()) == 0 for pair in step.states for state in pair)
    assert model.stack[0].dropout.p == 0.3
    json.dumps(report, allow_nan=False)


def test_without_a_gpu_a_capture_is_refused_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = model_of()
    cut = list(language.windows(text(400), 4, 20))
    step, report = checked_step(
        model, parts_of(model, "cpu"), cut, 1.0, "float32", capture=True
    )
    assert step.graph is None and len(report["failed"]) == 1
    assert "NOT TAKEN" in capsys.readouterr().out


# --- reading ---------------------------------------------------------------------


def test_texts_read_side_by_side_have_the_losses_of_each_alone() -> None:
    model = model_of()
    texts = {"valid": text(331, 1), "test": text(757, 2)}
    losses = read_texts(model, parts_of(model, "cpu"), texts)
    for name, ids in texts.items():
        alone = language.token_losses(model, ids)
        torch.testing.assert_close(losses[name], alone, rtol=1e-4, atol=1e-5)


def test_a_thin_model_is_read_as_the_library_reads_it() -> None:
    model = model_of()
    parts, small = thin_parts(model)
    ids = text(500, 1)
    losses = read_texts(model, parts, {"test": ids}, 3)["test"]
    alone = language.token_losses(small, ids, 3)
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = model_of()
    parts = parts_of(model, "cpu")
    parts["stack.2.decoder.bias"][0][5] = math.nan
    with pytest.raises(ValueError, match="valid, token 0"):
        read_texts(model, parts, {"valid": text(50)}, 2)


def test_halves_blocks_and_bands_add_up() -> None:
    ids = text(2000, 1)
    losses = {name: torch.rand(2000) * 5 for name in ("valid", "test")}
    dense = {name: torch.rand(2000) * 5 for name in ("valid", "test")}
    means = mean_losses(losses)
    both = (means["valid_first"] + means["valid_second"]) / 2
    assert both == pytest.approx(means["valid"])
    gap = float((losses["test"] - dense["test"]).double().mean())
    blocks = unpack(compared(losses, dense)["test_blocks"])
    assert blocks.shape == (BLOCKS,)
    assert blocks.mean(dtype=np.float64) == pytest.approx(gap, abs=2e-4)
    counts = torch.arange(WORDS) ** 3  # some words in every band
    bands = by_band(losses["test"], dense["test"], ids, counts)
    assert sum(band["tokens"] for band in bands) == 2000
    total = sum(band["tokens"] * band["mean"] for band in bands)
    assert total / 2000 == pytest.approx(gap)
    rare = counts[ids] < 10
    assert bands[0]["tokens"] == int(rare.sum())


# --- thin weights ----------------------------------------------------------------


@pytest.fixture
def setting() -> tuple[LSTMLanguageModel, Parts, dict[str, Any], Tensor]:
    model = model_of(hidden=24)
    ids = text(900)
    moments = drone.calibrate(model, language.batches(ids, 4, 10))
    return model, parts_of(model, "cpu"), moments, torch.bincount(ids, minlength=WORDS)


def test_svd_by_eigenvectors_is_the_svd(
    setting: tuple[LSTMLanguageModel, Parts, dict[str, Any], Tensor],
) -> None:
    _, parts, moments, counts = setting
    found = factorize_all(parts, moments, counts, "SVD")
    for name in names_of("products", parts):
        weight = parts[name][0]
        left, right = found[name].truncate(7)
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        best = (u[:, :7] * s[:7]) @ vt[:7]
        torch.testing.assert_close((left @ right).double(), best, rtol=1e-4, atol=1e-5)


def test_data_aware_is_what_compress_makes(
    setting: tuple[LSTMLanguageModel, Parts, dict[str, Any], Tensor],
) -> None:
    model, parts, moments, counts = setting
    found = factorize_all(parts, moments, counts, "data-aware")
    thin = thinned(parts, found, "all", 0.4)
    ranks = {
        n.removesuffix(".weight"): thin[n][0].shape[1]
        for n in names_of("products", parts)
    }
    small = drone.compress(model, ranks, moments)
    rank = thin["embedding.weight"][0].shape[1]
    small.embedding = drone.LowRankEmbedding.from_embedding(
        model.embedding, rank, counts
    )
    ids = text(300, 5)
    losses = read_texts(model, thin, {"x": ids})["x"]
    torch.testing.assert_close(
        losses, language.token_losses(small, ids), rtol=1e-4, atol=1e-4
    )
    assert weights_of(thin)["multiply_adds"] == int(
        drone.report(small)["multiply_adds"].sum()
    )


def test_kinds_name_each_matrix_once() -> None:
    parts = parts_of(model_of(), "cpu")
    alone = [name for kind in KINDS[:4] for name in names_of(kind, parts)]
    assert sorted(alone) == sorted(names_of("all", parts))
    assert len(alone) == len(set(alone)) == 6
    assert set(names_of("products", parts)) - set(
        names_of("but recurrent", parts)
    ) == set(names_of("recurrent", parts))
    with pytest.raises(ValueError, match="no kind"):
        names_of("softmax", parts)


def test_balanced_factors_make_the_same_product_and_weigh_alike() -> None:
    parts, _ = thin_parts(model_of())
    parts["embedding.weight"] = (torch.randn(WORDS, 4), torch.randn(4, HIDDEN))
    even = balanced(parts)
    before, after = multiplied(parts, torch.float32), multiplied(even, torch.float32)
    for name, factors in even.items():
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-5)
        if len(factors) == 2:
            left, right = factors
            torch.testing.assert_close(
                left.T @ left, right @ right.T, rtol=1e-3, atol=1e-4
            )


# --- training --------------------------------------------------------------------


def test_rates_are_those_of_zaremba() -> None:
    recipe = SIZES["large"].recipe()
    rates = [recipe.rate_at(epoch, 0, 10) for epoch in range(55)]
    assert recipe.clip == pytest.approx(10 / 35)
    assert rates[:14] == [35.0] * 14
    assert rates[14] == pytest.approx(35 / 1.15)
    assert rates[-1] == pytest.approx(35 / 1.15**41)
    shorter = SIZES["large"].recipe(40)
    assert shorter.hold == 10
    assert shorter.rate_at(39, 0, 10) == pytest.approx(rates[-1])
    falling = Recipe(2, 4.0, 1.0, linear=True)
    found = [falling.rate_at(e, s, 4) for e in range(2) for s in range(4)]
    assert found == [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"rate": 0.0}, {"clip": -1.0}, {"rate": math.inf}]
)
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Recipe(**({"epochs": 1, "rate": 1.0, "clip": 1.0} | wrong))


TEXTS = {"train": text(1500, 0, 10), "valid": text(200, 1, 10)}
RECIPE = Recipe(3, 5.0, 1.0, 2, 0.5, batch_size=4, steps=10)


def test_training_learns_and_goes_on_as_if_it_had_not_been_cut(tmp_path: Path) -> None:
    shell = model_of(dropout=0.2)
    whole = draw(shell, 0.5, 0)
    history, _ = train(shell, whole, TEXTS, RECIPE)
    # Who knows which words there are, and not their order, has log 10
    assert history[-1]["valid"] < history[0]["valid"]
    assert history[-1]["valid"] < 0.9 * math.log(10)

    class Cut(Exception):
        pass

    def cut_off(*_: Any, **__: Any) -> None:
        raise Cut

    parts = draw(shell, 0.5, 0)
    with pytest.MonkeyPatch.context() as patch:
        original = lstm_train._epoch
        patch.setattr(
            lstm_train,
            "_epoch",
            lambda ready, recipe, epoch: (
                cut_off() if epoch == 2 else original(ready, recipe, epoch)
            ),
        )
        with pytest.raises(Cut):
            train(shell, parts, TEXTS, RECIPE, checkpoints=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-002"]
    again = draw(shell, 0.1, 9)  # other weights: all must come from the checkpoint
    resumed, _ = train(shell, again, TEXTS, RECIPE, checkpoints=tmp_path)
    assert [e["valid"] for e in resumed] == [e["valid"] for e in history]
    for name, (weight,) in whole.items():
        assert torch.equal(weight, again[name][0])
    last, _ = train(shell, draw(shell, 0.1, 9), TEXTS, RECIPE, checkpoints=tmp_path)
    assert last == resumed


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    shell = model_of()
    train(shell, draw(shell, 0.1, 0), TEXTS, RECIPE, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"epoch-003.*of another training"):
        train(
            shell,
            draw(shell, 0.1, 0),
            TEXTS,
            Recipe(4, 5.0, 1.0, batch_size=4, steps=10),
            checkpoints=tmp_path,
        )
    file = tmp_path / "epoch-003" / "parts.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"epoch-003.*damaged"):
        train(shell, draw(shell, 0.1, 0), TEXTS, RECIPE, checkpoints=tmp_path)


def test_a_training_that_diverges_is_an_error() -> None:
    shell = model_of()
    parts = draw(shell, 0.1, 0)
    ready = prepare(shell, parts, TEXTS["train"], RECIPE)
    parts["stack.2.decoder.bias"][0].fill_(math.nan)
    with pytest.raises(ValueError, match="epoch 1"):
        train(shell, parts, TEXTS, RECIPE, ready=ready)


def test_weights_are_drawn_alike_and_written_exactly(tmp_path: Path) -> None:
    shell = model_of()
    parts = draw(shell, 0.04, 1)
    values = torch.cat([f.flatten() for fs in parts.values() for f in fs])
    assert 0.039 < float(values.abs().max()) <= 0.04
    assert torch.equal(
        draw(shell, 0.04, 1)["embedding.weight"][0], parts["embedding.weight"][0]
    )
    parts, _ = thin_parts(shell)
    save_parts(parts, tmp_path / "x.safetensors")
    back = load_parts(tmp_path / "x.safetensors")
    assert list(back) == sorted(parts) or set(back) == set(parts)
    for name, factors in parts.items():
        assert len(back[name]) == len(factors)
        assert all(torch.equal(a, b) for a, b in zip(factors, back[name], strict=True))


# --- the job ---------------------------------------------------------------------


def test_a_rate_is_chosen_inside_the_list() -> None:
    def loss(rate: float) -> float:
        return abs(math.log(rate) - math.log(20.0))

    assert chosen_rate(loss, [1.0, 3.0, 9.0], 4)[0] == 27.0
    assert chosen_rate(loss, [10.0, 20.0, 40.0], 4) == (
        20.0,
        {rate: loss(rate) for rate in (10.0, 20.0, 40.0)},
    )
    assert chosen_rate(loss, [100.0, 300.0], 9)[0] == pytest.approx(100 / 3)
    rate, tried = chosen_rate(lambda rate: -rate, [1.0, 2.0], 2)
    assert (rate, len(tried)) == (8.0, 4)


def test_a_study_runs_once_to_its_end_and_is_read_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SIZES, "tiny", lstm_train.Size(24, 0.1, 0.1, 2, 1, 2.0, 5.0, math.nan)
    )
    monkeypatch.setattr("drone.lab.lstm_study.SHARES", (0.3, 0.6))
    monkeypatch.setattr("drone.lab.lstm_job.RETRAINED", (0.3,))
    texts = {"train": text(9000), "valid": text(800, 1), "test": text(700, 2)}
    recipe = SIZES["tiny"].recipe()
    costs = drone.costs.measure(
        model_of(hidden=24), {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    )
    # Clocks of so small a model are noise: let every rank be the faster the smaller
    timed = {
        name: drone.costs.ModuleCosts(
            c.kind, c.ranks, c.weights, tuple(map(float, c.weights))
        )
        for name, c in costs.modules.items()
    }
    made = drone.costs.Costs(
        sum(c.seconds[-1] for c in timed.values()), timed
    ).to_json()

    def study() -> Study:
        return Study(texts, WORDS, "tiny", recipe, tmp_path / "cases", tmp_path / "m")

    done = [stage() for _, stage in stages(study(), {"word": made})]
    assert not any(case.found for case in done)
    again = [stage() for _, stage in stages(study(), {"word": made})]
    assert all(case.found for case in again)
    assert [c.path for c in again] == [c.path for c in done]
    by_job = {
        job: read_cases(tmp_path / "cases", job)
        for job in ("lstm-shares", "lstm-search", "lstm-retrain")
    }
    assert [len(found) for found in by_job.values()] == [len(KINDS), 3, 3]
    for case in by_job["lstm-search"]:
        grown = math.exp(case.result["loss"] - case.result["dense_loss"]) - 1
        assert grown <= case.settings["budget"] + 1e-6
    dense = done[0].result["losses"]
    for case in by_job["lstm-shares"]:
        for row in case.result:
            gap = unpack(row["test_blocks"]).mean(dtype=np.float64)
            assert row["test"] - dense["test"] == pytest.approx(gap, abs=2e-3)
    for case in by_job["lstm-retrain"]:
        rates = [t["rate"] for t in case.result["trials"]]
        assert case.result["rate"] in rates and len(rates) >= 3
        assert len(case.result["history"]) == 3


def test_weights_of_another_training_are_refused(tmp_path: Path) -> None:
    texts = {"train": text(2000), "valid": text(800, 1), "test": text(700, 2)}
    recipe = SIZES["tiny"].recipe(1)
    study = Study(texts, WORDS, "tiny", recipe, tmp_path / "cases", tmp_path / "m")
    study.trained()
    file = next((tmp_path / "m").glob("*/epoch-*/parts.safetensors"))
    save_parts(draw(study.shell, 0.1, 5), file)
    with pytest.raises(ValueError, match="not the weights of its case"):
        Study(
            texts, WORDS, "tiny", recipe, tmp_path / "cases", tmp_path / "m"
        ).spectra()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="not on this machine"):
        Study(
            texts, WORDS, "tiny", recipe, tmp_path / "cases", tmp_path / "m"
        ).spectra()
