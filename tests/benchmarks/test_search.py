"""Algorithm 2 beside a plain version of it, for the same plan: compare the medians.

A 12-layer BERT of hidden size 192 on 64 sentences, labelled with what the dense model
says, so that compression costs. The plain version also decomposes each module once,
but runs the whole model for every trial and tries the ranks from the smallest.
"""

import copy
import dataclasses

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from drone import LowRankLinear, calibrate, factorize
from drone.model.calibrate import frozen
from drone.model.walk import mean_loss
from drone.search import algorithm2, costs

BUDGET = 0.3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.classifier.weight.data *= 4  # clear opinions
    return model


@pytest.fixture(scope="module")
def batches(model):
    made = []
    for _ in range(4):
        ids = torch.randint(5, 200, (16, 24))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            made.append(batch | {"labels": model(**batch).logits.argmax(-1)})
    return made


@pytest.fixture(scope="module")
def times(model, batches):
    """Times in proportion to the weights, so that both searches share out alike."""
    names = [n for n in costs.searchable(model) if not n.endswith("self")]
    found = costs.measure(model, batches[0], names, repeats=2)
    modules = {
        name: dataclasses.replace(m, seconds=tuple(1e-9 * w for w in m.weights))
        for name, m in found.modules.items()
    }
    return costs.Costs(1.0, modules)


def drone_search(model, batches, times):
    plan = algorithm2.search_ranks(
        model, batches, BUDGET, modules=times.modules, times=times
    )
    return plan.ranks, plan.layer_forwards


def plain_search(model, batches, times):
    shares, ranks = algorithm2.shares(times), {}
    small, passes = copy.deepcopy(model), 1
    with frozen(small):
        allowed = mean_loss(small, batches)
        for name, module in times.modules.items():
            allowed *= (1 + BUDGET) ** shares[name]
            dense = small.get_submodule(name)
            moments = calibrate(small, batches, [name])
            found = factorize(dense.weight, moments[name])
            passes += 1
            for rank in module.ranks:
                thin = LowRankLinear.from_linear(dense, rank, found)
                small.set_submodule(name, thin)
                passes += 1
                if mean_loss(small, batches) <= allowed:
                    ranks[name] = rank
                    break
                small.set_submodule(name, dense)
    return ranks, 12 * passes


@pytest.mark.benchmark(group="Algorithm 2, 12 layers, 48 modules")
@pytest.mark.parametrize("run", [drone_search, plain_search], ids=["drone", "plain"])
def test_search(benchmark, model, batches, times, run):
    ranks, forwards = benchmark.pedantic(
        run, args=(model, batches, times), rounds=1, warmup_rounds=0
    )
    benchmark.extra_info["layer forwards"] = forwards
    benchmark.extra_info["ranks"] = str(sorted(ranks.items()))
