"""Σ x xᵀ of what really enters each layer: against sums made by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import SecondMoment, calibrate, encoder_linears, load_moments, save_moments
from drone.math import moments
from drone.model import moment_files

Batches = list[dict[str, Tensor]]


def moment_of(x: Tensor, mask: Tensor | None = None) -> SecondMoment:
    moment = SecondMoment(x.shape[-1])
    moment.update(x, mask)
    return moment


def assert_sums(found: SecondMoment, rows: Tensor, tolerance: float = 1e-12) -> None:
    """The sums are those of the rows, made by NumPy in float64."""
    x = rows.double().numpy()
    for tensor, expected in [
        (found.matrix, x.T @ x),
        (found.total, x.sum(0)),
        (found.centred, (x - x.mean(0)).T @ (x - x.mean(0))),
    ]:
        scale = np.linalg.norm(x) ** 2 if tensor.ndim == 2 else np.abs(x).sum()
        assert tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=tolerance * scale)
    assert torch.equal(found.matrix, found.matrix.T)
    assert found.count == len(rows)
    torch.testing.assert_close(found.mean, found.total / len(rows))


def assert_equal(found: SecondMoment, expected: SecondMoment) -> None:
    assert found.count == expected.count
    assert torch.equal(found.matrix, expected.matrix)
    assert torch.equal(found.total, expected.total)


# --- the sums ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, moments.BLOCK - 1, moments.BLOCK + 1, 400])
def test_the_matrix_is_that_of_numpy_for_sizes_that_are_no_multiple_of_a_block(
    dim: int,
) -> None:
    x = torch.randn(30, dim) + 1  # a mean that is not zero, for `centred`
    moment = moment_of(x)
    assert_sums(moment, x)
    moment.update(x[:7])  # once more after `matrix` was read
    assert_sums(moment, torch.cat([x, x[:7]]))


@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (0, 5), (4, 5), (2, 3, 5), (2, 1, 3, 5)]
)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    moment = moment_of(torch.ones(5))
    moment.update(x)
    assert_sums(moment, torch.cat([torch.ones(1, 5), x.reshape(-1, 5)]))


def test_a_view_that_is_not_contiguous_and_one_that_needs_gradients() -> None:
    x = torch.randn(5, 4, 3, requires_grad=True).transpose(0, 1)
    moment = moment_of(x)
    assert_sums(moment, x.detach().reshape(-1, 3))
    assert not moment.matrix.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_summed_in_float64(dtype: torch.dtype) -> None:
    # 2²⁸ + 3 needs 29 bits; float32 has 24, and float16 ends at 65,504.
    x = torch.tensor([[2.0**14, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    moment = moment_of(x)
    assert moment.matrix.tolist() == [[2**28 + 3, 2**14], [2**14, 1]]
    assert moment.total.tolist() == [2**14 + 3, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("pad", [0.0, 1e30, torch.nan, torch.inf])
def test_pads_never_count_whatever_they_hold(dtype: torch.dtype, pad: float) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    x = torch.randn(2, 3, 5)
    x[mask == 0] = pad
    assert_sums(moment_of(x, mask.to(dtype)), x[[0, 0, 1], [0, 1, 1]])


def test_without_a_vector_there_is_no_mean() -> None:
    empty = moment_of(torch.randn(2, 3), torch.zeros(2))
    assert empty.count == 0 and not empty.matrix.any()
    for name in ("mean", "centred"):
        with pytest.raises(ValueError, match="no vector"):
            getattr(empty, name)


def test_it_shows_its_size_and_count() -> None:
    assert repr(moment_of(torch.ones(2, 3))) == "SecondMoment(dim=3, count=2)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_vectors_on_a_gpu_are_summed_too() -> None:
    x = torch.randn(30, 200)
    assert_sums(moment_of(x.cuda(), torch.ones(30)), x)


def test_a_sum_begun_in_inference_mode_goes_on_outside() -> None:
    x = torch.randn(4, 200)
    with torch.inference_mode():
        moment = moment_of(x).copy()
    moment.update(x)
    assert_sums(moment, torch.cat([x, x]))


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, -1])
def test_a_dimension_below_one_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SecondMoment(dim)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 4), torch.ones(()), torch.ones(3, 2), torch.ones(2, 3).long()],
    ids=["other size", "a number", "columns", "integers"],
)
def test_what_is_no_vector_of_that_size_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating tensor \(..., 3\) is needed"):
        SecondMoment(3).update(x)


@pytest.mark.parametrize("shape", [(), (2,), (3,), (3, 2), (2, 3, 1), (2, 3, 5)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) is needed"):
        SecondMoment(5).update(torch.ones(2, 3, 5), torch.ones(shape))


@pytest.mark.parametrize("pad", [-torch.inf, torch.finfo(torch.float32).min, -1, 2])
def test_an_additive_mask_is_refused(pad: float) -> None:
    with pytest.raises(ValueError, match="other than 0"):
        SecondMoment(3).update(torch.ones(2, 3), torch.tensor([0, pad]))


@pytest.mark.parametrize("values", [[torch.nan], [torch.inf], [torch.inf, -torch.inf]])
def test_nan_and_inf_in_a_vector_that_counts_are_refused_and_change_nothing(
    values: list[float],
) -> None:
    moment = moment_of(torch.ones(4, 3))
    bad = torch.ones(4, 3)
    bad[: len(values), 1] = torch.tensor(values)
    with pytest.raises(ValueError, match="NaN or Inf"):
        moment.update(bad, torch.ones(4))
    assert_equal(moment, moment_of(torch.ones(4, 3)))


# --- merge and copy ----------------------------------------------------------------


@given(
    st.integers(1, 9), st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data()
)
def test_merged_batches_in_any_split_and_order_equal_one_pass(
    dim: int, lengths: list[int], data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: every sum is exact, so that the order cannot matter.
    x = torch.randint(-9, 10, (sum(lengths), dim), generator=generator).float()
    parts = data.draw(st.permutations(x.split(lengths)))
    merged = SecondMoment(dim)
    for part in parts:
        merged.merge(moment_of(part))
    assert_equal(merged, moment_of(x))


def test_merge_refuses_another_dimension() -> None:
    with pytest.raises(ValueError, match="dim is 4 there and 3 here"):
        SecondMoment(3).merge(SecondMoment(4))


def test_merge_leaves_the_other_alone_and_a_copy_is_independent() -> None:
    x = torch.randn(4, 200)
    first = moment_of(x)
    copy = first.copy()
    assert_equal(copy, first)
    copy.update(x)
    copy.merge(first)
    assert_equal(first, moment_of(x))
    assert_sums(copy, torch.cat([x, x, x]))


# --- files -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "moments.safetensors"
    save_moments({"b.c": moment_of(torch.randn(9, 3)), "a": SecondMoment(200)}, path)
    return path


def test_moments_come_back_bit_for_bit_and_can_go_on(tmp_path: Path) -> None:
    x = torch.randn(9, 200)
    written = {"encoder.1": moment_of(x), "a": SecondMoment(3)}
    save_moments(written, tmp_path / "new" / "file")
    found = load_moments(tmp_path / "new" / "file")
    assert list(found) == ["a", "encoder.1"]
    for name, moment in found.items():
        assert_equal(moment, written[name])
    found["encoder.1"].update(x)
    assert_sums(found["encoder.1"], torch.cat([x, x]))


@pytest.mark.parametrize("kept", [0, 4, 100, -8, -1])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{saved.name}.*damaged"):
        load_moments(saved)


def test_a_file_that_is_not_safetensors_is_refused(saved: Path) -> None:
    saved.write_text("Σ x xᵀ" * 100, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{saved.name}.*damaged"):
        load_moments(saved)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_moments(tmp_path / "none")


@pytest.mark.parametrize("metadata", [None, {"drone_moments": "2"}, {"format": "pt"}])
def test_another_format_is_refused(
    saved: Path, metadata: dict[str, str] | None
) -> None:
    save_file(load_file(saved), saved, metadata)
    with pytest.raises(ValueError, match="moments of format"):
        load_moments(saved)


@pytest.mark.parametrize("part", ["matrix", "total", "count"])
def test_a_file_without_a_part_of_a_moment_is_refused(saved: Path, part: str) -> None:
    tensors = load_file(saved)
    del tensors[f"b.c/{part}"]
    save_file(tensors, saved, {"drone_moments": str(moment_files.FORMAT_VERSION)})
    with pytest.raises(ValueError, match=r"b\.c lacks"):
        load_moments(saved)


def test_a_matrix_that_is_not_square_is_refused(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["b.c/matrix"] = torch.zeros(3, 4, dtype=torch.float64)
    save_file(tensors, saved, {"drone_moments": str(moment_files.FORMAT_VERSION)})
    with pytest.raises(
        ValueError, match=r"b\.c has a matrix of shape \(3, 4\); 3 rows"
    ):
        load_moments(saved)


def test_one_moment_may_have_two_names(tmp_path: Path) -> None:
    shared = moment_of(torch.randn(9, 3))
    save_moments({"query": shared, "key": shared}, tmp_path / "file")
    found = load_moments(tmp_path / "file")
    assert found.keys() == {"query", "key"}
    for moment in found.values():
        assert_equal(moment, shared)


def test_no_moments_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no moments"):
        save_moments({}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(moment_files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_moments({"a": SecondMoment(2)}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


# --- calibrate: the sums -----------------------------------------------------------


@pytest.fixture
def batches(padded_batch: dict[str, Tensor]) -> Batches:
    """The padded batch, and one of another shape without pads."""
    ids = torch.randint(5, 100, (2, 6))
    return [padded_batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def inputs_by_hand(model: nn.Module, names: list[str], batches: Batches) -> Iterator:
    """(name, inputs without pads) of each module: recorded whole, then cut."""
    for name in names:
        kept = []

        def record(_: nn.Module, args: Any, kept: list[Tensor] = kept) -> None:
            kept.append(args[0])

        handle = model.get_submodule(name).register_forward_pre_hook(record)
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        tokens = [batch["attention_mask"].bool() for batch in batches]
        yield name, torch.cat([x[m] for x, m in zip(kept, tokens, strict=True)])


def test_every_linear_of_the_encoder_gets_the_moment_of_its_own_inputs(
    family: PreTrainedModel, batches: Batches
) -> None:
    found = calibrate(family, batches)
    names = list(encoder_linears(family))
    assert list(found) == names
    for name, rows in inputs_by_hand(family, names, batches):
        assert len(rows) == 12 + 7 + 3 + 2 * 6
        assert_sums(found[name], rows)


def test_queries_keys_and_values_are_summed_once_and_get_moments_of_their_own(
    family: PreTrainedModel, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, sizes = SecondMoment.update, []

    def counted(self: SecondMoment, x: Tensor, mask: Tensor | None = None) -> None:
        sizes.append(self.dim)
        update(self, x, mask)

    monkeypatch.setattr(SecondMoment, "update", counted)
    found = list(calibrate(family, batches).values())
    # A layer: q, k and v together, the attention's output, the two of the FFN.
    assert sizes == 2 * 2 * [32, 32, 32, 64]
    queries, keys, values = (moment.copy() for moment in found[:3])
    assert_equal(queries, keys)
    assert_equal(queries, values)
    for moment in found[:3]:
        moment.update(torch.ones(32))
    for moment in found[:3]:
        assert moment.count == queries.count + 1


def test_neither_the_content_nor_the_number_of_pads_changes_a_moment(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    ids, mask = padded_batch["input_ids"], padded_batch["attention_mask"]
    other = torch.where(mask == 1, ids, 7)
    longer = {
        "input_ids": nn.functional.pad(ids, (0, 5), value=1),
        "attention_mask": nn.functional.pad(mask, (0, 5)),
    }
    expected = calibrate(family, [padded_batch])
    for batch in (longer, {"input_ids": other, "attention_mask": mask}):
        for name, moment in calibrate(family, [batch]).items():
            # Another length is another order of the float32 sums of the forward pass.
            slack = 1e-6 * float(moment.matrix.norm())
            torch.testing.assert_close(
                moment.matrix, expected[name].matrix, rtol=0, atol=slack
            )
            assert moment.count == 22


def test_pieces_merged_equal_one_run(tiny_model: PreTrainedModel) -> None:
    ids = torch.randint(5, 100, (4, 9))
    whole = [
        {"input_ids": row[None], "attention_mask": torch.ones(1, 9)} for row in ids
    ]
    merged = calibrate(tiny_model, whole[:1])
    for name, moment in calibrate(tiny_model, iter(whole[1:])).items():
        merged[name].merge(moment)
    for name, moment in calibrate(tiny_model, whole).items():
        torch.testing.assert_close(
            merged[name].matrix, moment.matrix, rtol=1e-12, atol=1e-12
        )
        assert merged[name].count == moment.count == 36


def test_poolers_and_heads_see_one_vector_a_sentence(
    tiny_bert: PreTrainedModel, batches: Batches
) -> None:
    names = ["classifier", "bert.pooler.dense"]
    found = calibrate(tiny_bert, batches, names)
    assert list(found) == names
    with torch.no_grad():
        outputs = [tiny_bert.bert(**batch) for batch in batches]
    first = torch.cat([output.last_hidden_state[:, 0] for output in outputs])
    assert_sums(found["bert.pooler.dense"], first)
    assert_sums(found["classifier"], torch.cat([o.pooler_output for o in outputs]))


def test_a_model_in_bfloat16_is_calibrated(
    tiny_bert: PreTrainedModel, batches: Batches
) -> None:
    found = calibrate(tiny_bert.bfloat16(), batches)
    names = list(found)
    for name, rows in inputs_by_hand(tiny_bert, names[:1] + names[-1:], batches):
        assert rows.dtype == torch.bfloat16
        assert_sums(found[name], rows)


def test_dropout_is_off_while_calibrating(
    tiny_bert: PreTrainedModel, batches: Batches
) -> None:
    expected = calibrate(tiny_bert, batches)
    found = calibrate(tiny_bert.train(), batches)
    assert found and found.keys() == expected.keys()
    for name, moment in found.items():
        assert_equal(moment, expected[name])


def test_a_name_given_twice_counts_once(
    tiny_bert: PreTrainedModel, batches: Batches
) -> None:
    assert calibrate(tiny_bert, batches, ["classifier"] * 2)["classifier"].count == 5


class Two(nn.Module):
    """Two layers side by side; `between` is called on the input between them."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
        self.between = between or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(self.between(x))


def test_an_input_changed_in_place_between_two_modules_is_summed_anew() -> None:
    x = torch.randn(5, 3)
    found = calibrate(Two(torch.relu_), [{"x": x.clone()}], ["a", "b"])
    assert_sums(found["a"], x)
    assert_sums(found["b"], x.relu())


def test_a_module_run_twice_counts_both_inputs() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(5, 3)
    model = nn.Sequential(layer, layer)
    found = calibrate(model, [{"input": x}], ["0"])
    assert_sums(found["0"], torch.cat([x, layer(x).detach()]))


def test_a_tensor_of_the_batch_before_is_summed_anew() -> None:
    class Apart(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    u, v = torch.randn(5, 3), torch.randn(5, 3)
    found = calibrate(Apart(), [{"x": u, "y": v}, {"x": v, "y": u}], ["a", "b"])
    for name in "ab":
        assert_sums(found[name], torch.cat([u, v]))


def test_modules_that_share_an_input_only_at_times_are_refused() -> None:
    turns = iter([lambda x: x, torch.clone])
    model = Two(lambda x: next(turns)(x))
    with pytest.raises(ValueError, match=r"b: in batch 1 .* no longer that of a"):
        calibrate(model, [{"x": torch.ones(1, 3)}] * 2, ["a", "b"])


# --- calibrate: what it leaves behind ----------------------------------------------


def state(model: nn.Module) -> tuple[list[bool], list[int]]:
    """The mode of each module, and how many hooks it has."""
    modules = list(model.modules())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
    return [m.training for m in modules], hooks


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modes_gradients_and_hooks_are_as_before_also_after_an_error(
    tiny_bert: PreTrainedModel, batches: Batches, training: bool, fails: bool
) -> None:
    tiny_bert.train(training)
    tiny_bert.bert.embeddings.eval()  # frozen, as one does in fine-tuning
    tiny_bert.classifier.train()
    before = state(tiny_bert)
    inside = []

    def look(model: nn.Module, *_: object) -> None:
        inside.append((any(state(model)[0]), torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("the forward pass fails")

    handle = tiny_bert.bert.register_forward_pre_hook(look)
    try:
        calibrate(tiny_bert, batches)
    except RuntimeError as error:
        assert fails and "the forward pass fails" in str(error)
    handle.remove()
    assert inside == [(False, False)] * (1 if fails else 2)
    assert state(tiny_bert) == before
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in tiny_bert.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["classifier", "bert.pooler.dens"], r"'bert\.pooler\.dens'.*bert\.pooler\."),
        (["zzz"], r"no module 'zzz'.*bert\.encoder\.layer\.0"),
    ],
)
def test_an_unknown_name_is_refused_with_names_that_are_near(
    tiny_bert: PreTrainedModel, batches: Batches, names: list[str], message: str
) -> None:
    before = state(tiny_bert)
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_bert, batches, names)
    assert state(tiny_bert) == before


# --- calibrate: what is refused ----------------------------------------------------


def test_no_batches_are_refused(tiny_bert: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no batch"):
        calibrate(tiny_bert, iter([]))


def test_a_module_that_is_never_reached_is_named() -> None:
    model = Two()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"never reached.*unused"):
        calibrate(model, [{"x": torch.ones(1, 3)}], ["a", "unused"])


def test_nan_names_the_module_and_the_batch(
    tiny_bert: PreTrainedModel, batches: Batches
) -> None:
    query = tiny_bert.bert.encoder.layer[1].attention.self.query
    query.register_forward_pre_hook(
        lambda _, args: (args[0] * (torch.nan if len(args[0]) == 2 else 1),)
    )
    name = "bert.encoder.layer.1.attention.self.query"
    with pytest.raises(ValueError, match=f"{name}, batch 1: .*NaN or Inf"):
        calibrate(tiny_bert, batches, [name])


def test_text_without_a_mask_is_refused(
    tiny_model: PreTrainedModel, batches: Batches
) -> None:
    del batches[1]["attention_mask"]
    with pytest.raises(ValueError, match="batch 1 has input_ids and no attention_mask"):
        calibrate(tiny_model, batches)


def test_without_text_and_mask_every_vector_counts() -> None:
    x = torch.randn(2, 4, 3)
    model = nn.Sequential(nn.Linear(3, 3))
    assert_sums(calibrate(model, [{"input": x}], ["0"])["0"], x.reshape(-1, 3))


def test_a_mask_that_does_not_fit_the_inputs_names_the_module_and_the_batch() -> None:
    class Masked(Two):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    good = {"x": torch.ones(2, 4, 3), "attention_mask": torch.ones(2, 4)}
    bad = {**good, "attention_mask": torch.ones(2, 1, 1, 4)}
    with pytest.raises(ValueError, match=r"a, batch 1: .*\(2, 4\) is needed"):
        calibrate(Masked(), [good, bad], ["a", "b"])


def test_an_input_given_by_name_is_seen_and_what_is_no_tensor_refused() -> None:
    class ByName(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x)

    x = torch.randn(4, 3)
    assert_sums(calibrate(ByName(), [{"x": x}], ["a"])["a"], x)
    model = nn.Sequential(ByName())
    model[0].forward = lambda x: x["a"]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="0: its first argument is no tensor"):
        calibrate(model, [{"input": {"a": x}}], ["0"])
