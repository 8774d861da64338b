"""Words in and perplexity out: against probabilities made by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from drone import LSTMConfig, LSTMLanguageModel
from drone.lab import language
from drone.lab.language import (
    Vocabulary,
    batches,
    language_model,
    perplexity,
    token_losses,
    windows,
)

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "dropout": 0.2}


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
    return np.asarray(1 / (1 + np.exp(-x)))


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
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not any(module.training for module in one.modules())


# --- training --------------------------------------------------------------------
