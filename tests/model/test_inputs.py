"""Batches in any usual form, the loss of any model, and what each module really saw."""

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedModel

import drone
from drone import (
    OneClassWarning,
    SecondMoment,
    calibrate,
    compress,
    factorize_modules,
    prepare,
)
from drone.model.calibrate import Collector, frozen
from drone.model.loss import batch_loss, mean_loss
from drone.model.quantize import int8
from drone.model.walk import Walk

Batch = dict[str, Any]


def assert_same(found: dict[str, SecondMoment], right: dict[str, SecondMoment]) -> None:
    for name, moment in right.items():
        assert found[name].count == moment.count
        assert torch.equal(found[name].matrix, moment.matrix)


# --- forms of a batch ------------------------------------------------------------


def test_every_usual_form_of_a_batch_is_the_same_batch(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    right = calibrate(tiny_bert, [padded_batch])
    forms: list[Any] = [
        padded_batch,  # one dict alone
        BatchEncoding(padded_batch),
        [BatchEncoding(padded_batch)],
        iter([padded_batch]),
        [{k: v.numpy() for k, v in padded_batch.items()}],
        [{k: v.tolist() for k, v in padded_batch.items()}],
        [(padded_batch, torch.ones(3, dtype=torch.long))],
        prepare([padded_batch], tiny_bert),
    ]
    for form in forms:
        assert_same(calibrate(tiny_bert, form), right)


def test_rows_without_a_batch_axis_are_batches_of_one(
    tiny_bert: PreTrainedModel,
) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "label": 1},
        {"input_ids": torch.tensor([8, 9]), "attention_mask": torch.tensor([1, 1])},
    ]
    first, second = prepare(rows, tiny_bert)
    assert first["input_ids"].shape == (1, 3) and first["labels"].tolist() == [1]
    assert second["input_ids"].tolist() == [[8, 9]]
    assert {m.count for m in calibrate(tiny_bert, rows).values()} == {5}


def test_rows_of_a_data_set_with_tensor_columns(tiny_bert: PreTrainedModel) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"input_ids": [[5, 6], [7, 8, 9]], "attention_mask": [[1, 1], [1, 1, 1]]}
    rows = datasets.Dataset.from_dict(columns).with_format("torch")
    assert {m.count for m in calibrate(tiny_bert, rows).values()} == {5}
    with pytest.raises(ValueError, match="DatasetDict; choose one of train"):
        calibrate(tiny_bert, datasets.DatasetDict({"train": rows}))


def test_pairs_of_a_data_loader_are_inputs_and_labels() -> None:
    x, y = torch.randn(6, 3), torch.arange(6)
    model = nn.Sequential(nn.Linear(3, 2))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    moment = calibrate(model, loader, ["0"])["0"]
    torch.testing.assert_close(moment.matrix, (x.double().T @ x.double()))
    assert [list(batch) for batch in prepare(loader, model)] == [
        ["input", "labels"]
    ] * 2
    assert calibrate(model, [x.numpy()], ["0"])["0"].count == 6
    assert calibrate(model, [x.double().numpy()], ["0"])["0"].count == 6


def test_a_list_of_two_rows_is_no_pair_of_inputs_and_labels(
    tiny_bert: PreTrainedModel,
) -> None:
    """The second row would be taken for labels, and its tokens would not count."""
    row = {"input_ids": torch.arange(5, 9), "attention_mask": torch.ones(4).long()}
    loader: Any = DataLoader([row] * 4, batch_size=2, collate_fn=list)
    with pytest.raises(ValueError, match="batch 0 is a pair of dicts"):
        calibrate(tiny_bert, loader)


def test_prepared_batches_are_not_made_again(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    once = prepare(iter([padded_batch]), tiny_bert)
    assert prepare(once, tiny_bert) is once
    assert once[0]["input_ids"] is padded_batch["input_ids"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (3, "the batches are the int '3'"),
        ("data.csv", "the str 'data.csv'"),
        (Path("data.csv"), "the PosixPath 'data.csv'"),
        (None, "the batches are a NoneType"),
        ({"a": SecondMoment(2)}, "these are moments, not batches"),
        (torch.ones(2, 3), "a Tensor.*one batch or several"),
        ((torch.ones(2, 3), torch.ones(2)), "a tuple of 2.*one batch or several"),
        ([{"input": torch.ones(1, 3)}, "text"], "batch 1 is the str 'text'"),
        ([(torch.ones(2, 3),) * 3], "batch 0 is a tuple of 3"),
        ([{}], "batch 0 is empty"),
        ([{"input": torch.ones(1, 3)}, {"x": ["a", "b"]}], "batch 1: 'x' is text"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "batch 0: 'x' is no array.*padded first"),
    ],
)
def test_what_is_no_batch_is_named_with_its_number(batches: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches, ["0"])


def test_swapped_arguments_are_told_apart(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match="the model is a list"):
        calibrate([padded_batch], tiny_bert)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="modules is the str 'classifier'; give a list"
    ):
        calibrate(tiny_bert, [padded_batch], "classifier")
    with pytest.raises(TypeError, match="moments are a list"):
        compress(tiny_bert, {"classifier": 1}, [padded_batch])  # type: ignore[arg-type]
    pair = (padded_batch["input_ids"], padded_batch["attention_mask"])
    with pytest.raises(ValueError, match="second part looks like a mask"):
        calibrate(tiny_bert, [pair])


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="on the meta device"):
        calibrate(model, [torch.ones(2, 3)], ["0"])


# --- what each module really saw -------------------------------------------------


class Turns(nn.Module):
    """Calls its layers by a plan for each batch: (layer, what is added to x)."""

    def __init__(self, *plans: list[tuple[str, int]]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.plans = iter(plans)

    def forward(self, x: Tensor) -> Tensor:
        inputs = {0: x}
        for name, more in next(self.plans):
            inputs.setdefault(more, x + more)
            self.get_submodule(name)(inputs[more])
        return x


@pytest.mark.parametrize(
    "plan",
    [
        [("a", 0), ("b", 0), ("a", 1)],
        [("a", 1), ("a", 0), ("b", 0)],
        [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 1)],
        [("a", 0), ("b", 1), ("a", 0), ("b", 0)],
        [("a", 0), ("a", 0), ("b", 0)],
        [("b", 0), ("a", 0), ("b", 1), ("c", 1), ("b", 2)],
    ],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_each_module_counts_what_it_saw_whoever_shared_it(
    plan: list[tuple[str, int]], batches: int
) -> None:
    xs = [torch.randn(5, 3) for _ in range(batches)]
    names = sorted({name for name, _ in plan})
    found = calibrate(Turns(*[plan] * batches), [{"x": x} for x in xs], names)
    for name in names:
        seen = torch.cat([x + more for x in xs for n, more in plan if n == name])
        rows = seen.double()
        assert found[name].count == len(rows)
        torch.testing.assert_close(found[name].matrix, rows.T @ rows)


def test_moments_of_two_modules_are_not_one_object() -> None:
    plan = [("a", 0), ("b", 0), ("c", 0)]
    found = calibrate(Turns(plan), [{"x": torch.ones(5, 3)}], ["a", "b", "c"])
    found["a"].update(torch.ones(1, 3))
    assert [moment.count for moment in found.values()] == [6, 5, 5]


def test_a_vector_that_counts_many_times_is_summed_so() -> None:
    collector, x = Collector(), torch.randn(4, 3)
    collector.start(0)
    collector.see("a", x, None, 3)
    (moment,) = collector.finish(["a"]).values()
    rows = x.double().repeat(3, 1)
    torch.testing.assert_close(moment.matrix, rows.T @ rows)
    torch.testing.assert_close(moment.total, rows.sum(0))
    assert moment.count == 12


class Pair(nn.Module):
    """Two modules see one tensor, which may be changed in place between them."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.a, self.b, self.change = nn.Linear(3, 2), nn.Linear(3, 2), change

    def forward(self, x: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        x = x * 1
        y = self.a(x)
        if self.change:
            x.mul_(0)
        return y + self.b(x)


@pytest.mark.parametrize("by", ["key", "function"])
def test_modules_with_one_input_and_masks_of_their_own_share_nothing(by: str) -> None:
    keys = {"a": "m1", "b": "m2"}
    mask = keys if by == "key" else lambda name, batch, _: batch[keys[name]]
    ones, some = torch.ones(2, 6), torch.ones(2, 6)
    some[:, 2:] = 0
    # In the first batch both masks are equal, which must not make them one.
    batches = [{"x": torch.randn(2, 6, 3), "m1": ones, "m2": m} for m in (ones, some)]
    found = calibrate(Pair(False), batches, ["a", "b"], mask=mask)
    assert [found[name].count for name in "ab"] == [24, 16]
    alone = calibrate(Pair(False), batches, ["b"], mask={"": "m2"})["b"]
    one = calibrate(Pair(False), batches, ["b"], mask=mask)["b"]
    for each in (one, found["b"]):
        torch.testing.assert_close(each.matrix, alone.matrix)


def test_a_collector_shares_a_sum_only_where_the_same_counts() -> None:
    x, half = torch.randn(4, 3), torch.tensor([True, True, False, False])
    collector = Collector()
    collector.start(0)
    collector.see("a", x)
    collector.see("b", x, half)
    collector.see("c", x, half.clone())
    collector.see("d", x, half, 2)
    found = collector.finish("abcd")
    assert [found[name].count for name in "abcd"] == [4, 2, 2, 4]
    assert len(collector.groups) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_between_two_modules_is_seen(inference: bool) -> None:
    batch = {name: torch.ones(2, 6) for name in ("m1", "m2")} | {
        "x": torch.ones(2, 6, 3)
    }
    with torch.inference_mode(inference):
        found = calibrate(Pair(True), [batch], ["a", "b"], mask={"": None})
    assert float(found["a"].matrix.sum()) == 108 and not found["b"].matrix.any()


@pytest.mark.parametrize("inference", [False, True])
def test_a_walk_sees_a_change_in_place_between_two_modules(inference: bool) -> None:
    batch = {name: torch.ones(2, 6) for name in ("m1", "m2")} | {
        "x": torch.ones(2, 6, 3)
    }
    with torch.inference_mode(inference), frozen(model := Pair(True)):
        assert Walk(model, [batch], ["a", "b"]).groups() == [["a"], ["b"]]


def test_two_threads_that_calibrate_one_model_do_not_count_double() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return self.a(x)

    model, found = Slow().train(), []

    def work() -> None:
        found.append(calibrate(model, [{"x": torch.ones(5, 3)}] * 4, ["a"])["a"].count)

    def use() -> None:
        for _ in range(8):
            model(torch.ones(7, 3))

    threads = [threading.Thread(target=each) for each in (work, work, use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20, 20]
    assert model.training and not model.a._forward_pre_hooks


def test_a_calibration_inside_a_calibration_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))

    def batches() -> Iterator[Batch]:
        calibrate(model, [torch.ones(5, 3)], ["0"])
        yield {"input": torch.ones(5, 3)}

    with pytest.raises(ValueError, match="one calibration at a time"):
        calibrate(model, batches(), ["0"])
    assert calibrate(model, [torch.ones(5, 3)], ["0"])["0"].count == 5


def test_the_random_state_is_the_callers() -> None:
    class Draws(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(()))

    model = nn.Sequential(Draws(3, 2))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    calibrate(model, [torch.ones(5, 3)], ["0"])
    with frozen(model):
        torch.rand(9)
    assert torch.equal(torch.rand(3), expected)


def test_hooks_of_the_user_stay_and_what_they_change_is_seen() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    calls = []
    model[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    rows = (x + 1).double()
    found = calibrate(model, [x], ["0"])["0"]
    torch.testing.assert_close(found.matrix, rows.T @ rows)
    assert len(model[0]._forward_pre_hooks) == len(model[0]._forward_hooks) == 1
    assert calls == [1]


def test_a_block_calibrated_by_its_own_name_is_found(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    blocks = list(drone.attention_blocks(family))
    by_block = compress(
        family, dict.fromkeys(blocks, 3), calibrate(family, [padded_batch], blocks)
    )
    by_query = compress(
        family, dict.fromkeys(blocks, 3), calibrate(family, [padded_batch])
    )
    with torch.no_grad():
        a, b = (model(**padded_batch).logits for model in (by_block, by_query))
    assert torch.equal(a, b)


# --- the loss --------------------------------------------------------------------


class Gives(nn.Module):
    """Returns its loss in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.linear(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return {
            "attribute": SimpleNamespace(loss=loss, logits=logits),
            "key": {"loss": loss, "logits": logits},
            "first": (loss, logits),
            "logits": logits,
        }[self.way]


@pytest.mark.parametrize("way", ["attribute", "key", "first"])
def test_the_loss_is_what_the_model_returns(way: str) -> None:
    model, x, y = Gives(way), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    right = float(nn.functional.cross_entropy(model.linear(x), y))
    found = batch_loss(model, {"x": x, "labels": y}, 0)
    assert found == (pytest.approx(right), 5)


def test_a_function_gives_the_loss_of_a_model_that_has_none() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(7, 3), torch.randint(2, (7,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input"]), batch["labels"])

    halves = [(x[:5], y[:5]), (x[5:], y[5:])]
    right = float(nn.functional.cross_entropy(model(x), y))
    assert mean_loss(model, halves, loss) == pytest.approx(right)
    with pytest.raises(ValueError, match="Linear returns no loss for batch 0; give"):
        mean_loss(model, halves)
    with pytest.raises(ValueError, match="batch 0: the loss has shape"):
        mean_loss(model, halves, lambda m, b: m(b["input"]))


def test_answers_in_a_text_have_no_labels_and_count_by_the_row() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.BertForQuestionAnswering(hf.BertConfig(vocab_size=50, **sizes)).eval()
    ids = torch.randint(5, 50, (6, 9))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole |= {"start_positions": torch.arange(6), "end_positions": torch.arange(6) + 2}
    parts = [{k: v[:4] for k, v in whole.items()}, {k: v[4:] for k, v in whole.items()}]
    assert batch_loss(model, parts[0], 0)[1] == 4
    assert mean_loss(model, parts) == pytest.approx(mean_loss(model, [whole]))


def test_the_first_token_of_a_row_is_not_predicted_and_does_not_weigh() -> None:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval()
    short, long = torch.randint(5, 50, (3, 2)), torch.randint(5, 50, (1, 9))
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in (short, long)
    ]
    each = [float(model(**b).loss) for b in batches]
    right = (3 * each[0] + 8 * each[1]) / 11  # 3 and 8 predictions
    assert mean_loss(model, batches) == pytest.approx(right)


def test_a_classifier_of_one_class_is_warned_of(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    batch = {**padded_batch, "labels": torch.tensor([0, 1, 0])}
    with torch.no_grad():
        tiny_bert.classifier.bias[:] = torch.tensor([0.0, 1e3])
    with pytest.warns(OneClassWarning, match="predicts class 1 for every row"):
        mean_loss(tiny_bert, [batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_loss(tiny_bert, [{**batch, "labels": torch.tensor([1, 1, 1])}])


def test_without_a_batch_there_is_no_loss() -> None:
    with pytest.raises(ValueError, match="no batch"):
        mean_loss(Gives("key"), [])


def test_numpy_scalars_are_numbers() -> None:
    (batch,) = prepare([{"x": np.float64(2.0)}], nn.Linear(1, 1))
    assert batch["x"].dtype == torch.float32 and float(batch["x"]) == 2


def test_a_weight_that_is_offloaded_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    batch = {"input": torch.ones(4, 6)}
    model[1].weight = nn.Parameter(torch.empty(6, 6, device="meta"))
    for call in (
        lambda: calibrate(model, [batch], ["0"]),
        lambda: compress(model, {"1": 2}),
        lambda: compress(model, {"1": 2}, batches=[batch], sequential=True),
        lambda: compress(model, 0.5, batches=[batch]),
        lambda: factorize_modules(model, ["1"]),
        lambda: int8(model),
    ):
        with pytest.raises(ValueError, match=r"^1\.weight is on the meta device: "):
            call()
    assert compress(model, {"0": 2})[1] is not None  # what is not asked for may be
