"""A decoder's rows, perplexity and cache against a token at a time."""

import math
from pathlib import Path

import pytest
import torch

import drone
from drone.lab import decoder
from drone.lab.decoder import NextToken, Size
from drone.lab.training import Recipe

WORDS, SIZE = 30, Size(layers=2, hidden=16, heads=2, context=8, dropout=0.0)


def text(tokens: int = 200) -> torch.Tensor:
    """A text with something to learn: each word is the one before, plus 1 or 2."""
    steps = torch.randint(1, 3, (tokens,))
    return steps.cumsum(0) % (WORDS - 1) + 1


def test_perplexity_is_that_of_each_token_given_its_window() -> None:
    model, ids = decoder.decoder(WORDS, SIZE), text(80)
    losses = []
    for token in range(len(ids)):
        start = token - token % SIZE.context  # ten parts of eight tokens: a window each
        before = torch.cat([torch.zeros(1).long(), ids[:-1]])[start : token + 1]
        logits = model(before[None]).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[token]])
    expected = math.exp(float(torch.stack(losses).mean()))
    assert decoder.perplexity(model, ids, SIZE.context) == pytest.approx(expected)


def test_a_uniform_model_chooses_among_all_words() -> None:
    model, ids = decoder.decoder(WORDS, SIZE), text()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert decoder.perplexity(model, ids, 8) == pytest.approx(WORDS)


def test_word_frequencies_alone() -> None:
    train, ids = torch.tensor([0, 0, 1]), torch.tensor([0, 2])
    # smoothed: 3, 2 and 1 of 6
    expected = math.exp(-(math.log(1 / 2) + math.log(1 / 6)) / 2)
    assert decoder.unigram_perplexity(train, ids, 3) == pytest.approx(expected)


def test_training_learns_and_is_found_again(tmp_path: Path) -> None:
    start, ids = decoder.decoder(WORDS, SIZE), text(1600)
    recipe = Recipe(epochs=4, batch_size=16, learning_rate=1e-2)
    first = decoder.train(start, ids, 8, recipe, cache=tmp_path)
    known = decoder.unigram_perplexity(ids, ids, WORDS)
    assert decoder.perplexity(first.model, ids, 8) < known / 2
    again = decoder.train(start, ids, 8, recipe, cache=tmp_path)
    assert (first.cached, again.cached) == (False, True)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "relative",
    [drone.family.FWSVD(), drone.family.Shifted(), drone.family.SharedBasis(2)],
    ids=str,
)
def test_the_verb_takes_a_decoder(relative: drone.family.Shifted) -> None:
    model, ids = decoder.decoder(WORDS, SIZE), text()
    given = decoder.batches(ids, 8)
    small = drone.compress(model, 0.5, batches=given, relative=relative)
    assert small.compressed.kept <= 0.5
    assert len(small.compressed.ranks) == 4 * SIZE.layers
    assert math.isfinite(decoder.perplexity(small, ids, 8))


def test_one_token_more_is_what_the_whole_text_gives() -> None:
    model, ids = decoder.decoder(WORDS, SIZE), text(9)[None]
    step = NextToken(model, ids[:, :8])
    whole = model(ids).logits[:, -1:]
    for _ in range(2):  # the second call finds the prompt as it was
        assert torch.allclose(step(ids[:, 8:]), whole, atol=1e-5)
    # keys and values, float32: 2 x layers x tokens x hidden x 4 bytes
    assert step.cache_bytes == 2 * SIZE.layers * 8 * SIZE.hidden * 4


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 8"):
        decoder.rows(text(7), 8)
    with pytest.raises(ValueError, match="dropout is 1"):
        Size(dropout=1.0)
