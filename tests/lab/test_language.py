"""Words in and perplexity out: against probabilities made by hand; training resumes."""

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from drone import LowRankLinear, LSTMConfig, LSTMLanguageModel, compress
from drone.lab import language
from drone.lab.language import (
    Recipe,
    Trained,
    Vocabulary,
    batches,
    language_model,
    perplexity,
    token_losses,
    train,
    windows,
)
from drone.layers.lstm import KERNEL_FROM

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "dropout": 0.2}
RECIPE = Recipe(epochs=3, batch_size=4, steps=5, learning_rate=2.0)
Run = Callable[..., Trained]


def made(**changes: Any) -> LSTMLanguageModel:
    """A model to which some words are more probable than others."""
    model = LSTMLanguageModel(LSTMConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def model() -> LSTMLanguageModel:
    return made()


@pytest.fixture
def text() -> Tensor:
    """More words than one window of any batch size below holds."""
    return torch.randint(11, (157,))


# --- the vocabulary --------------------------------------------------------------


def test_words_are_numbered_by_frequency_after_eos_and_equals_by_the_alphabet() -> None:
    found = Vocabulary.of(["b a a c", "a <unk> b", "", "c d"])
    assert found.words == ("<eos>", "a", "b", "c", "<unk>", "d")
    assert len(found) == 6


def test_the_end_of_a_sentence_is_a_word_already() -> None:
    assert Vocabulary.of(["a <eos> b <eos>"]).words == ("<eos>", "a", "b")


def test_sentences_become_one_stream_with_an_end_after_each() -> None:
    found = Vocabulary(("<eos>", "a", "b")).encode(["b a", "", "a  a"])
    assert found.tolist() == [2, 1, 0, 0, 1, 1, 0]
    assert found.dtype == torch.int64


def test_an_unknown_word_becomes_unk_where_there_is_one() -> None:
    found = Vocabulary.of(["a <unk>"]).encode(["zebra a"])
    assert found.tolist() == [1, 2, 0]  # "<" comes before letters


def test_an_unknown_word_without_unk_is_named_with_its_sentence() -> None:
    words = Vocabulary.of(["a b"])
    with pytest.raises(ValueError, match=r"sentence 1: 'zebra' .* 3 words"):
        words.encode(["a", "b zebra", "gnu"])


@pytest.mark.parametrize("corpus", [[], [""], ["", " "]])
def test_a_corpus_without_a_word_is_refused(corpus: list[str]) -> None:
    with pytest.raises(ValueError, match="no word"):
        Vocabulary.of(corpus)


def test_nothing_to_encode_is_refused() -> None:
    with pytest.raises(ValueError, match="no sentence"):
        Vocabulary.of(["a"]).encode([])


lines = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=5), max_size=6)


@given(lines.filter(any))
def test_numbers_turn_back_into_the_sentences(sentences: list[list[str]]) -> None:
    corpus = [" ".join(each) for each in sentences]
    found = Vocabulary.of(corpus)
    stream = [found.words[number] for number in found.encode(corpus)]
    assert stream == [word for each in sentences for word in [*each, "<eos>"]]
    counts = [sum(s.count(w) for s in sentences) for w in found.words[1:]]
    assert counts == sorted(counts, reverse=True) and min(counts) > 0


# --- windows ---------------------------------------------------------------------

parts = st.integers(1, 60).flatmap(
    lambda count: st.tuples(st.just(count), st.integers(1, count))
)


@given(parts, st.integers(1, 20))
def test_every_token_is_a_label_once_in_order_after_the_one_before_it(
    sizes: tuple[int, int], steps: int
) -> None:
    count, batch_size = sizes
    ids = torch.arange(100, 100 + count)
    cut = list(windows(ids, batch_size, steps))
    for before, labels in cut:
        assert before.shape == labels.shape and len(labels) == batch_size
    assert all(labels.shape[1] == steps for _, labels in cut[:-1])
    assert 1 <= cut[-1][1].shape[1] <= steps
    befores, labels = (torch.cat(each, 1).flatten() for each in zip(*cut, strict=True))
    assert torch.equal(labels[:count], ids)
    assert (labels[count:] == -100).all()  # and nothing but the end is filled up
    assert len(labels) == batch_size * -(-count // batch_size)
    assert befores[0] == 0  # <eos>
    assert torch.equal(befores[1:count], ids[:-1])
    assert (befores >= 0).all()  # of every one there is an embedding


@pytest.mark.parametrize("batch_size", [0, -1, 6])
def test_more_parts_than_tokens_or_none_are_refused(batch_size: int) -> None:
    ids = torch.arange(5)
    for function in (windows, batches):
        with pytest.raises(ValueError, match=rf"{batch_size}; 1 to 5 are allowed"):
            list(function(ids, batch_size, 2))


def test_a_stream_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 1"):
        list(windows(torch.tensor([], dtype=torch.int64), 1, 2))


@pytest.mark.parametrize(
    ("count", "batch_size", "steps", "whole"),
    [(24, 2, 4, 3), (23, 2, 4, 2), (30, 2, 4, 3), (7, 2, 4, 0), (12, 4, 1, 3)],
)
def test_batches_are_the_whole_windows(
    count: int, batch_size: int, steps: int, whole: int
) -> None:
    ids = torch.arange(1, count + 1)
    found = batches(ids, batch_size, steps)
    assert len(found) == whole
    for batch, (before, labels) in zip(
        found, windows(ids, batch_size, steps), strict=False
    ):
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        assert torch.equal(batch["input_ids"], before)
        assert torch.equal(batch["labels"], labels)
        assert batch["labels"].shape == (batch_size, steps) and (labels > 0).all()
        assert torch.equal(batch["attention_mask"], torch.ones_like(before))


# --- losses and perplexity -------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def losses_by_hand(
    model: LSTMLanguageModel, ids: list[int], batch_size: int
) -> list[float]:
    """-log of the probability of each word, one word after another, in float64."""
    w = {name: t.double().numpy() for name, t in model.state_dict().items()}
    layers, hidden = model.config.num_layers, model.config.hidden_size
    length = -(-len(ids) // batch_size)
    losses = []
    for at, label in enumerate(ids):
        if at % length == 0:  # a part begins
            h, c = np.zeros((2, layers, hidden))
        x = w["embedding.weight"][ids[at - 1] if at else 0]
        for n in range(layers):
            gates = w[f"stack.{n}.input.weight"] @ x + w[f"stack.{n}.input.bias"]
            gates += w[f"stack.{n}.recurrent.weight"] @ h[n]
            i, f, g, o = np.split(gates, 4)
            c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
            x = h[n] = sigmoid(o) * np.tanh(c[n])
        scores = w[f"stack.{layers}.decoder.weight"] @ x
        odds = np.exp(scores + w[f"stack.{layers}.decoder.bias"])
        losses.append(-math.log(odds[label] / odds.sum()))
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
@pytest.mark.parametrize("steps", [4, 70])
def test_losses_are_those_of_probabilities_made_by_hand(
    model: LSTMLanguageModel,
    text: Tensor,
    batch_size: int,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language, "STEPS", steps)  # the state goes from call to call
    expected = losses_by_hand(model, text.tolist(), batch_size)
    found = token_losses(model, text, batch_size)
    assert found.shape == text.shape and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert perplexity(model, text, batch_size) == pytest.approx(
        math.exp(sum(expected) / len(expected)), rel=1e-5
    )


def test_by_default_ten_parts_are_read_side_by_side(
    model: LSTMLanguageModel, text: Tensor
) -> None:
    assert torch.equal(token_losses(model, text), token_losses(model, text, 10))
    assert perplexity(model, text) == perplexity(model, text, 10)


def test_one_part_is_one_long_call(model: LSTMLanguageModel, text: Tensor) -> None:
    before = F.pad(text[:-1], (1, 0))[None]
    with torch.inference_mode():
        logits = model(before).logits[0]
    expected = F.cross_entropy(logits, text, reduction="none")
    torch.testing.assert_close(token_losses(model, text, 1), expected)


@pytest.mark.parametrize("batch_size", [1, 4, 157])
def test_a_model_that_hears_nothing_gives_each_word_its_own_probability(
    model: LSTMLanguageModel, text: Tensor, batch_size: int
) -> None:
    with torch.no_grad():
        model.stack[-1].decoder.weight.zero_()
    own = -model.stack[-1].decoder.bias.detach().log_softmax(0)
    found = token_losses(model, text, batch_size)  # in order, each once
    torch.testing.assert_close(found, own[text])


def test_the_perplexity_of_equal_probabilities_is_the_number_of_words(
    model: LSTMLanguageModel, text: Tensor
) -> None:
    with torch.no_grad():
        for parameter in model.stack[-1].parameters():
            parameter.zero_()
    assert perplexity(model, text) == pytest.approx(11, rel=1e-6)


def test_modes_are_restored_and_dropout_is_off(
    model: LSTMLanguageModel, text: Tensor
) -> None:
    expected = perplexity(model, text)
    model.train()
    model.stack[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert perplexity(model, text) == expected
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_a_loss_that_is_not_finite_is_refused_and_its_token_named(
    model: LSTMLanguageModel,
) -> None:
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"token 3: no finite loss"):
        token_losses(model, torch.tensor([1, 2, 7, 4, 5]), 1)


def test_fewer_tokens_than_parts_are_refused(model: LSTMLanguageModel) -> None:
    with pytest.raises(ValueError, match="1 to 9 are allowed"):
        perplexity(model, torch.arange(9))


# --- a model ---------------------------------------------------------------------


def test_a_seed_decides_the_weights_and_the_callers_random_state_stays() -> None:
    config = LSTMConfig(**SIZES)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (language_model(config, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert equal(one.state_dict(), same.state_dict())
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not any(module.training for module in one.modules())


# --- training --------------------------------------------------------------------


@pytest.fixture
def corpus() -> Tensor:
    """A text in which each word has the same successor, 7 windows long."""
    return torch.arange(1, 133) % 11


@pytest.fixture
def run(tmp_path: Path, corpus: Tensor) -> Run:
    """`train` on that corpus, cached in this test's own folder."""
    torch.manual_seed(0)
    start = made()

    def run(**changes: Any) -> Trained:
        options = {
            "model": start,
            "ids": corpus,
            "validation": corpus[:40],
            "recipe": RECIPE,
            "cache": tmp_path / "cache",
        } | changes
        return train(**options)

    return run


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """From here on each step's learning rate is noted; before one of them, act."""

    def watch(
        at: int | None = None, act: Callable[[SGD], object] | None = None
    ) -> list[float]:
        rates: list[float] = []

        class Watched(SGD):
            def step(self, *args: Any, **kwargs: Any) -> Any:
                rates.append(self.param_groups[0]["lr"])
                if len(rates) == at and act is not None:
                    act(self)
                return super().step(*args, **kwargs)

        monkeypatch.setattr(torch.optim, "SGD", Watched)
        return rates

    return watch


def cut_off(_: SGD) -> None:
    raise KeyboardInterrupt


def spoil(optimizer: SGD) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data.fill_(torch.nan)


def weights(found: Trained) -> dict[str, Tensor]:
    return found.model.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def numbers(found: Trained) -> list[dict[str, float]]:
    """The history without what the clock says."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in found.history]


def kept(cache: Path) -> dict[str, list[str]]:
    """Folders in the cache that are no result, and what they hold."""
    return {
        path.suffix: sorted(each.name for each in path.iterdir())
        for path in cache.iterdir()
        if path.suffix == ".checkpoints"
    }


def results(cache: Path) -> list[str]:
    names = (path.name for path in cache.iterdir())
    return [n for n in names if not n.endswith(".checkpoints") and n != ".locks"]


@pytest.mark.parametrize(("steps", "epochs"), [(5, 20), (KERNEL_FROM + 4, 60)])
def test_the_loss_falls(run: Run, corpus: Tensor, steps: int, epochs: int) -> None:
    found = run(recipe=Recipe(epochs, batch_size=4, steps=steps, learning_rate=3.0))
    assert [entry["epoch"] for entry in found.history] == list(range(1, epochs + 1))
    assert all(entry["seconds"] >= 0 for entry in found.history)
    assert found.history[-1]["train"] < 0.7 * found.history[0]["train"]
    assert found.history[-1]["validation"] < 11 / 2  # 11 is to know nothing
    # What is reported is the perplexity of the very model that is returned.
    expected = perplexity(found.model, corpus[:40])
    assert found.history[-1]["validation"] == pytest.approx(expected, rel=1e-6)


def test_a_copy_is_trained_and_returned_in_eval_mode(run: Run) -> None:
    start = made(dropout=0.0).train()
    before = copy.deepcopy(start.state_dict())
    found = run(model=start)
    assert equal(start.state_dict(), before)
    assert all(module.training for module in start.modules())
    assert not any(module.training for module in found.model.modules())
    assert all(p.grad is None for p in start.parameters())
    changed = [k for k, v in weights(found).items() if not torch.equal(v, before[k])]
    assert set(changed) == set(before)


def test_the_second_call_is_a_hit_that_says_so_and_has_the_same_weights(
    run: Run, capsys: pytest.CaptureFixture[str], watch: Callable[..., list[float]]
) -> None:
    first = run()
    assert not first.cached and "cache hit" not in capsys.readouterr().out
    steps = watch()
    second = run()
    assert second.cached and steps == []
    assert "cache hit: language model, seed 0" in capsys.readouterr().out
    assert equal(weights(first), weights(second))
    assert (first.history, first.key) == (second.history, second.key)
    assert len(first.key) == 64


def test_the_same_seed_gives_the_same_numbers_and_another_others(
    run: Run, tmp_path: Path
) -> None:
    first = run(cache=tmp_path / "one")
    torch.manual_seed(99)
    again = run(cache=tmp_path / "two")
    assert equal(weights(first), weights(again)) and numbers(first) == numbers(again)
    other = run(seed=1)  # of dropout
    assert other.key != first.key and not other.cached
    assert not equal(weights(first), weights(other))
    assert numbers(first) != numbers(other)


def test_a_run_and_a_cache_hit_leave_the_callers_random_state_alone(run: Run) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    draws = []
    for act in (lambda: None, run, run):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        act()
        draws.append(draw())
    assert draws[0] == draws[1] == draws[2]


def test_the_key_changes_with_whatever_goes_into_the_training(
    run: Run, corpus: Tensor
) -> None:
    one = replace(RECIPE, epochs=1)
    different = {
        "epochs": 2,
        "batch_size": 3,
        "steps": 6,
        "learning_rate": 1.0,
        "hold": 0.5,
        "clip": 0.5,
    }
    assert set(different) == set(Recipe.__dataclass_fields__)
    torch.manual_seed(0)
    other_dropout = made(dropout=0.3)  # the same weights
    changes = [{"recipe": replace(one, **{k: v})} for k, v in different.items()]
    changes += [
        {"seed": 1},
        {"ids": corpus[:-1]},
        {"validation": corpus[:41]},
        {"model": made()},
        {"model": compress(made(), {"stack.0.recurrent": 2})},
        {"model": other_dropout},
    ]
    found = [run(recipe=one), *(run(**({"recipe": one} | each)) for each in changes)]
    assert len({each.key for each in found}) == len(found)
    assert not any(each.cached for each in found)
    assert run(recipe=one).key == found[0].key


def test_next_to_no_learning_rate_changes_nothing_and_every_token_is_seen_once(
    run: Run, corpus: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "bfloat16_gains", lambda *_: False)
    start = made(dropout=0.0)
    found = run(
        model=start, recipe=replace(RECIPE, learning_rate=1e-30), ids=corpus[1:]
    )
    before = start.state_dict()
    assert all(torch.allclose(weights(found)[k], before[k], 0, 1e-27) for k in before)
    # In training, too, the state goes on from window to window.
    expected = perplexity(start, corpus[1:], RECIPE.batch_size)
    for entry in found.history:
        assert entry["train"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("hold", "held"), [(0.0, 0), (0.3, 7), (1.0, 21)])
def test_the_learning_rate_is_held_and_then_falls_to_nothing(
    run: Run, watch: Callable[..., list[float]], hold: float, held: int
) -> None:
    rates = watch()
    run(recipe=replace(RECIPE, hold=hold))
    peak = RECIPE.learning_rate
    assert len(rates) == 21 and rates[:held] == [peak] * held  # of 3 · 7 steps
    length = 21 - 21 * hold
    assert rates[held:] == pytest.approx(
        [peak * (21 - n) / length for n in range(held, 21)]
    )


@pytest.mark.parametrize(("clip", "clipped"), [(1e-3, True), (1e3, False)])
def test_a_step_goes_down_the_gradient_and_no_further_than_the_clip(
    run: Run,
    corpus: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    clip: float,
    clipped: bool,
) -> None:
    monkeypatch.setattr(language, "bfloat16_gains", lambda *_: False)
    start = made(dropout=0.0)
    ((before, labels),) = windows(corpus, 4, len(corpus))
    output = copy.deepcopy(start)
    output(before, labels).loss.backward()
    slope = torch.cat([p.grad.flatten() for p in output.parameters()])
    found = run(model=start, recipe=Recipe(1, 4, len(corpus), 2.0, 1.0, clip))
    pairs = zip(start.parameters(), found.model.parameters(), strict=True)
    moved = torch.cat([(new - old).flatten() for old, new in pairs])
    size = clip if clipped else float(slope.norm())
    assert torch.allclose(moved, -2.0 * size * slope / slope.norm(), atol=1e-6)


@pytest.mark.parametrize("hold", [-0.1, 1.1])
def test_a_hold_that_is_no_share_is_refused(hold: float) -> None:
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        Recipe(hold=hold)


def test_thin_factors_stay_thin_and_learn(run: Run) -> None:
    ranks = {"stack.0.input": 3, "stack.0.recurrent": 2, "stack.2.decoder": 2}
    start = compress(made(), ranks)
    found = run(model=start)
    for name, rank in ranks.items():
        old, new = start.get_submodule(name), found.model.get_submodule(name)
        assert isinstance(new, LowRankLinear) and new.rank == rank
        assert not torch.equal(old.left, new.left)
        assert not torch.equal(old.right, new.right)
    assert equal(weights(run(model=start)), weights(found))  # and back from the cache


def test_a_tied_model_stays_tied(
    run: Run, watch: Callable[..., list[float]], tmp_path: Path
) -> None:
    start = made(tie_word_embeddings=True)
    found = run(model=start)
    watch(at=10, act=cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(model=start, cache=tmp_path / "cut")
    watch()
    resumed = run(model=start, cache=tmp_path / "cut")
    for each in (found, run(model=start), resumed):
        model = each.model
        assert model.stack[-1].decoder.weight is model.embedding.weight
        assert equal(weights(each), weights(found))
    assert not torch.equal(found.model.embedding.weight, start.embedding.weight)


# --- interruptions ---------------------------------------------------------------


@pytest.mark.parametrize("at", [8, 10, 14, 17])
def test_a_training_that_was_cut_off_ends_with_the_same_numbers(
    run: Run,
    watch: Callable[..., list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    rates = watch()
    whole = run(cache=tmp_path / "whole")
    assert len(rates) == 21
    watch(at=at, act=cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    done = (at - 1) // 7  # whole epochs
    # The last two: should the newest be damaged, one epoch is lost.
    names = [f"epoch-{n:03d}" for n in range(max(1, done - 1), done + 1)]
    assert kept(tmp_path / "cache") == {".checkpoints": names}
    assert results(tmp_path / "cache") == []  # nothing to be taken
    torch.manual_seed(99)
    rest = watch()
    resumed = run()
    assert f"goes on after epoch {done}" in capsys.readouterr().out
    assert rest == rates[7 * done :]
    assert not resumed.cached and resumed.key == whole.key
    assert equal(weights(resumed), weights(whole))
    assert numbers(resumed) == numbers(whole)
    assert results(tmp_path / "cache") == [whole.key[:20]] and not kept(
        tmp_path / "cache"
    )


def test_a_training_cut_off_in_its_first_epoch_begins_again(
    run: Run, watch: Callable[..., list[float]], tmp_path: Path
) -> None:
    whole = run(cache=tmp_path / "whole")
    watch(at=3, act=cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    rest = watch()
    assert equal(weights(run()), weights(whole))
    assert len(rest) == 21


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (10, "the loss is nan at step 3 of epoch 2"),
        (14, "no finite loss"),  # by the last step of an epoch
    ],
)
def test_a_loss_that_is_not_finite_stops_and_the_last_good_epoch_stays(
    run: Run,
    watch: Callable[..., list[float]],
    tmp_path: Path,
    at: int,
    message: str,
) -> None:
    whole = run(cache=tmp_path / "whole")
    watch(at=at, act=spoil)
    with pytest.raises(ValueError, match=message):
        run()
    assert kept(tmp_path / "cache") == {".checkpoints": ["epoch-001"]}
    rest = watch()
    resumed = run()
    assert len(rest) == 14
    assert equal(weights(resumed), weights(whole))
    assert numbers(resumed) == numbers(whole)


# --- damage ----------------------------------------------------------------------


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record))


DAMAGES = [
    ("model.safetensors", flip, "SHA-256"),
    ("model.safetensors", halve, "SHA-256"),
    ("record.json", halve, "cannot be read"),
    ("record.json", forget, "a field is missing"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_a_damaged_result_is_refused_and_named(
    run: Run, tmp_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "cache" / run().key[:20] / file
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        run()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "history.json", "whole.json"])
@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
def test_a_damaged_checkpoint_costs_an_epoch(
    run: Run,
    watch: Callable[..., list[float]],
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = watch()
    whole = run(cache=tmp_path / "whole")
    watch(at=17, act=cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    (path,) = (tmp_path / "cache").glob(f"*.checkpoints/epoch-002/{file}")
    damage(path)
    rest = watch()
    resumed = run()
    assert "not used: epoch-002" in capsys.readouterr().out
    assert rest == rates[7:]  # from the first epoch's end
    assert equal(weights(resumed), weights(whole))
    assert numbers(resumed) == numbers(whole)


def test_with_no_whole_checkpoint_the_training_begins_again(
    run: Run, watch: Callable[..., list[float]], tmp_path: Path
) -> None:
    whole = run(cache=tmp_path / "whole")
    watch(at=10, act=cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    (path,) = (tmp_path / "cache").glob("*.checkpoints")
    halve(path / "epoch-001" / "model.safetensors")
    (path / "epoch-002").mkdir()  # such as a full disk leaves it
    (path / ".partial-here-1-x").mkdir()
    rest = watch()
    assert equal(weights(run()), weights(whole)) and len(rest) == 21


def test_a_validation_text_too_short_is_found_before_the_training(
    run: Run, watch: Callable[..., list[float]], corpus: Tensor, tmp_path: Path
) -> None:
    steps = watch()
    with pytest.raises(ValueError, match="validation text has 9 tokens; at least 10"):
        run(validation=corpus[:9])
    assert steps == [] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("epochs", 0, "epochs is 0; at least 1"),
        ("epochs", 1.5, "epochs is 1.5; a whole number"),
        ("batch_size", 0, "batch_size is 0"),
        ("steps", True, "steps is True"),
        ("learning_rate", 0.0, "learning_rate is 0.0; a number above 0"),
        ("learning_rate", math.inf, "learning_rate is inf; a finite"),
        ("clip", -1.0, "clip is -1.0; a number above 0"),
        ("clip", math.nan, "clip is nan"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_its_fields_name(
    field: str, value: float, said: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        replace(RECIPE, **{field: value})


def test_frozen_weights_and_a_tie_are_part_of_the_key(run: Run) -> None:
    start = made(dropout=0.0)
    first = run(model=start)
    start.embedding.requires_grad_(False)
    found = run(model=start)
    assert not found.cached and found.key != first.key
    assert torch.equal(found.model.embedding.weight, start.embedding.weight)
    tied, loose = (made(tie_word_embeddings=tie) for tie in (True, False))
    loose.load_state_dict(tied.state_dict())
    assert run(model=tied).key != run(model=loose).key


def test_a_corpus_shorter_than_a_batch_is_refused(run: Run, corpus: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size is 4; 1 to 3 are allowed"):
        run(ids=corpus[:3])
