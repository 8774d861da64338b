"""Attention maps and what is read from them."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import drone
from drone.lab.maps import attention_maps, moved, same_word, share_on


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def batch():
    # pairs "a b | b c" and "a | c", 0 a pad, 1 a separator
    ids = torch.tensor([[1, 7, 8, 1, 8, 9, 1], [1, 7, 1, 9, 1, 0, 0]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": (ids > 0).long(),
    }


def test_maps_are_those_of_the_equations(model, batch):
    maps = attention_maps(model, batch)
    assert maps.shape == (2, 2, 3, 7, 7)
    x = model.bert.embeddings(batch["input_ids"], batch["token_type_ids"])
    attention = model.bert.encoder.layer[0].attention.self
    q, k = attention.query(x).view(2, 7, 3, 8), attention.key(x).view(2, 7, 3, 8)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    pads = batch["attention_mask"][:, None, None] == 0
    expected = logits.masked_fill(pads, -torch.inf).softmax(-1)
    assert torch.allclose(maps[0], expected, atol=1e-6)


def test_the_model_is_left_as_it_was(model, batch):
    before = model.config._attn_implementation
    logits = model(**batch).logits
    attention_maps(model, batch)
    assert model.config._attn_implementation == before
    assert torch.equal(model(**batch).logits, logits)


def test_a_compressed_model_has_maps_too(model, batch):
    blocks = list(drone.attention_blocks(model))
    whole = drone.compress(model, dict.fromkeys(blocks, 8))  # all of a head's numbers
    maps = attention_maps(whole, batch)
    assert torch.allclose(maps, attention_maps(model, batch), atol=1e-5)


def test_moved_is_none_for_equal_maps_and_all_for_disjoint_ones(batch):
    mask = batch["attention_mask"]
    first, second = torch.zeros(2, 1, 2, 1, 7, 7)
    first[..., 0], second[..., 1] = 1, 1
    assert moved(first, first, mask).tolist() == [[0.0]]
    assert moved(first, second, mask).tolist() == [[1.0]]
    # what a pad looks at does not count
    pads_only = copy.deepcopy(first)
    pads_only[:, 1, :, 5:] = second[:, 1, :, 5:]
    assert moved(first, pads_only, mask).tolist() == [[0.0]]


def test_the_same_word_is_in_the_other_sentence_and_no_separator(batch):
    found = same_word(batch, torch.tensor([0, 1]))
    assert found.nonzero().tolist() == [[0, 2, 4], [0, 4, 2]]


def test_the_share_on_targets_counts_only_tokens_that_have_one(batch):
    targets = same_word(batch, torch.tensor([0, 1]))
    maps = torch.full((1, 2, 1, 7, 7), 1 / 7)
    maps[0, 0, 0, 2] = torch.eye(7)[4]  # one of the two looks there whole
    share = share_on(maps, targets, batch["attention_mask"])
    assert share.tolist() == [[pytest.approx((1 + 1 / 7) / 2)]]
