"""The figure and the calculator of *Explore*: their numbers are the records'."""

import json
import re

import pytest
import torch
from built_site import ROOT, needs_browser, soup
from torch import nn

import drone
from book.explore import RECORDS, measured

PAGE = "book/explore.html"


def records(name):
    path = ROOT / "book" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_recorded_is_the_error_on_fresh_tokens():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).double()
    W = linear.weight.detach()
    seen, fresh = (
        torch.randn(24, 24).double() @ torch.randn(24, 99).double() for _ in "ab"
    )
    moments = []
    for tokens in (seen, fresh):
        moment = drone.SecondMoment(24)
        moment.update(tokens.T)
        moments.append(moment)
    found = measured(linear, *moments)
    assert found["ranks"] == [0, 8, 16, 24]
    for name, basis in [("lost_svd", W), ("lost_drone", W @ seen)]:
        U = torch.linalg.svd(basis)[0]
        for k, error in zip(found["ranks"], found[name], strict=True):
            small = U[:, :k] @ U[:, :k].T @ W
            lost = ((W - small) @ fresh).norm() / (W @ fresh).norm()
            assert error == pytest.approx(float(lost), abs=1e-4)


def test_each_matrix_of_minilm_is_recorded_and_the_page_has_just_that(site):
    layers = records(RECORDS.stem)
    assert len(layers) == 36
    assert len({(r["layer"], r["kind"]) for r in layers}) == 36
    page = soup(site / PAGE)
    shown = json.loads(page.select_one(".rank-figure-data").string)
    assert shown == [{key: r[key] for key in shown[0]} for r in layers]
    clocks = json.loads(page.select_one(".break-even-data").string)
    products = [r for r in records("09-hardware-timing") if r["what"] == "product"]
    assert clocks == [{key: r[key] for key in clocks[0]} for r in products]


@needs_browser
class TestFigure:
    @pytest.fixture
    def figure(self, address, page):
        page.goto(address + PAGE, wait_until="load")
        page.wait_for_selector(".rank-plot polyline")
        return page

    def test_the_keyboard_moves_it_and_it_says_what_is_recorded(self, figure):
        layer, kind = figure.locator(".rank-figure select").all()
        layer.select_option("3")
        kind.select_option("output")
        slider = figure.locator(".rank-figure input")
        slider.focus()
        figure.keyboard.press("Home")
        for _ in range(5):
            figure.keyboard.press("ArrowRight")
        (record,) = [
            r for r in records(RECORDS.stem) if (r["layer"], r["kind"]) == (3, "output")
        ]
        assert figure.locator(".rank-figure output").inner_text() == "40"
        assert figure.locator(".rank-figure .toy-number").all_inner_texts() == [
            f"{100 * record[name][5]:.1f} %" for name in ("lost_svd", "lost_drone")
        ]
        said = re.sub(r"\s+", " ", figure.locator(".rank-cost").first.inner_text())
        m, n = record["out"], record["in"]
        assert f"{40 * (m + n):,} parameters" in said
        assert f"rank {drone.break_even_rank(m, n)}." in said

    def test_a_finger_moves_it(self, figure):
        slider = figure.locator(".rank-figure input")
        slider.click(position={"x": 4, "y": 10})
        assert int(figure.locator(".rank-figure output").inner_text()) < 40

    def test_the_calculator_counts_as_the_library_and_shows_recorded_times(
        self, figure
    ):
        for m, n, k in [(384, 384, 96), (1536, 384, 7), (3, 5, 1), (768, 3072, 304)]:
            cost = figure.evaluate(f"rankCost({m}, {n}, {k})")
            assert cost["breakEven"] == drone.break_even_rank(m, n)
            assert (cost["thin"], cost["dense"]) == (k * (m + n), m * n)
        times = [
            f"{r['measured']:.2f}× at {r['tokens']} token"
            for r in records("09-hardware-timing")
            if r["what"] == "product"
            and (r["out"], r["in"], r["rank"]) == (3072, 768, 304)
        ]
        assert len(times) == 3
        said = figure.locator(".rank-clock").inner_text()
        assert all(time in said for time in times)
        figure.locator(".break-even input").first.fill("100")
        assert (
            "No time is recorded for 100" in figure.locator(".rank-clock").inner_text()
        )
        figure.locator(".break-even input").first.fill("0")
        assert "above zero" in figure.locator(".break-even .rank-cost").inner_text()
