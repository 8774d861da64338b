"""Two threads search one model: neither sees what the other does with it."""

import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import costs, search_ranks
from drone.model.gradients import calibrate_gradients

Batch = dict[str, Tensor]


def test_a_search_is_undisturbed_by_another_that_ends_first(
    tiny_bert: PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    batches = task(tiny_bert)[:1]
    times = costs.measure(tiny_bert, batches[0])
    tiny_bert.train()
    begun, go, modes = threading.Event(), threading.Event(), []

    def first(model: nn.Module, batch: Batch) -> Tensor:
        begun.set()
        assert go.wait(60)
        return model(**batch).loss

    def second(model: nn.Module, batch: Batch) -> Tensor:
        go.set()
        thread.join(0.02)
        modes.append(model.training)
        return model(**batch).loss

    def search() -> None:
        how = {"method": "uniform", "times": times, "loss": first}
        search_ranks(tiny_bert, batches, keep=0.9, **how)

    thread = threading.Thread(target=search)
    thread.start()
    assert begun.wait(60)
    how = {"keep": 0.5, "method": "greedy", "times": times}
    plan = search_ranks(tiny_bert, batches, loss=second, **how)
    thread.join()
    assert modes and not any(modes)
    assert tiny_bert.training and all(m.training for m in tiny_bert.modules())
    assert plan.loss == search_ranks(tiny_bert, batches, **how).loss


def test_gradients_collected_by_two_threads_leave_the_model_as_it_was(
    tiny_bert: PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    batches, name = task(tiny_bert), "bert.encoder.layer.0.output.dense"
    tiny_bert.train()
    inside, found = threading.Barrier(2), []

    def slow() -> object:
        for number, batch in enumerate(batches * 4):
            if number == 0:
                with suppress(threading.BrokenBarrierError):
                    inside.wait(0.3)  # both at once, if both are let in
            yield batch

    def work() -> None:
        found.append(calibrate_gradients(tiny_bert, slow(), [name])[name])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and torch.equal(found[0].fisher, found[1].fisher)
    assert tiny_bert.training
    assert all(p.requires_grad for p in tiny_bert.parameters())
