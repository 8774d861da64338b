"""No figure without a text, none wider than the page, the same one the same bytes."""

from base64 import b64decode
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from drone.lab import figures, names

ALT = "Error against rank: it falls steeply, then levels out at rank 20."


@pytest.fixture(autouse=True)
def style() -> Any:
    with mpl.rc_context():
        mpl.use("agg")
        figures.use_style()
        yield
        plt.close("all")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `show` hands to the notebook."""
    calls: list[dict[str, Any]] = []

    def display(bundle: dict[str, str], **options: Any) -> None:
        calls.append({"bundle": bundle, **options})

    monkeypatch.setattr(figures, "display", display)
    return calls


def plot(**size: Any) -> Figure:
    figure, axes = plt.subplots(**size)
    axes.plot([1, 2, 3], [3.0, 1.0, 0.5], label="error")
    axes.set_xlabel("rank")
    axes.legend()
    return figure


@pytest.mark.parametrize("alt", ["", "a plot", " " * 40, "x" * 29 + "   "])
def test_a_text_too_short_is_refused(shown: list[dict[str, Any]], alt: str) -> None:
    with pytest.raises(ValueError, match="at least 30 characters"):
        figures.show(plot(), alt)
    assert not shown


def test_a_figure_wider_than_the_page_is_refused(shown: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"7\.1 in wide; at most 7\.0"):
        figures.show(plot(figsize=(7.1, 3)), ALT)
    assert not shown
    figures.show(plot(figsize=(7.0, 3)), ALT)
    assert len(shown) == 1


def test_the_text_is_in_the_display_metadata(shown: list[dict[str, Any]]) -> None:
    figures.show(plot(figsize=(5, 3)), f"  {ALT} ")
    (call,) = shown
    assert call["metadata"] == {"image/png": {"alt": ALT, "width": 480}}
    assert call["raw"] is True
    assert set(call["bundle"]) == {"image/png", "text/plain"}


def test_the_same_plot_gives_the_same_png_and_no_software_version(
    shown: list[dict[str, Any]],
) -> None:
    for _ in range(2):
        figures.show(plot(), ALT)
    first, second = (b64decode(call["bundle"]["image/png"]) for call in shown)
    assert first == second
    assert first.startswith(b"\x89PNG") and b"atplotlib" not in first
    width = int.from_bytes(first[16:20], "big")
    assert width == 7 * 160


def test_a_shown_figure_is_closed_so_the_notebook_does_not_show_it_again(
    shown: list[dict[str, Any]],
) -> None:
    figures.show(plot(), ALT)
    assert plt.get_fignums() == []


# --- the look of new chapters ------------------------------------------------------


def test_new_chapters_draw_svg_the_same_each_time_and_undated(
    shown: list[dict[str, Any]],
) -> None:
    figures.style()
    for _ in range(2):
        figures.show(plot(), ALT)
    first, second = (call["bundle"]["image/svg+xml"] for call in shown)
    assert first == second
    assert "atplotlib" not in first.split("<g ")[0] and "<dc:date>" not in first
    assert shown[0]["metadata"] == {"image/svg+xml": {"alt": ALT, "width": 499}}


def test_letters_are_ten_pixels_high_on_a_phone() -> None:
    figures.style()
    phone = 390 - 2 * 16  # pixels, without the page's margins
    shrunk = min(1, phone / (96 * figures.COLUMN))
    smallest = min(mpl.rcParams["font.size"], mpl.rcParams["legend.fontsize"])
    assert smallest * 96 / 72 * shrunk > 9
    assert mpl.rcParams["font.size"] * 96 / 72 * shrunk >= 10


def test_a_new_figure_is_no_wider_than_its_letters_allow(
    shown: list[dict[str, Any]],
) -> None:
    figures.style()
    with pytest.raises(ValueError, match=r"7\.0 in wide; at most 5\.2"):
        figures.show(plot(figsize=(7.0, 3)), ALT)


def test_every_method_has_a_name_and_a_look_of_its_own() -> None:
    assert list(figures.LOOKS) == list(names.METHODS)
    lines = {
        "bound",
        "majority",
        "break-even",
        "noise",
    }  # what methods are read against
    colours = [look[0] for key, look in figures.LOOKS.items() if key not in lines]
    markers = [look[1] for key, look in figures.LOOKS.items() if key not in lines]
    assert len(set(colours)) == len(colours)
    assert len(set(markers)) == len(markers)
    drawn = [(colour, line) for colour, _, line in figures.LOOKS.values()]
    assert len(set(drawn)) == len(drawn)
    assert all(figures.LOOKS[key][1] == "" for key in lines)


def test_looks_are_those_of_the_whole_book() -> None:
    """Readers learn them in chapter 1: SVD is orange, what knows the data blue."""
    assert figures.look("svd")["color"] == figures.COLORS["orange"]
    assert figures.look("drone")["color"] == figures.COLORS["blue"]
    changed = figures.look("svd", label=None, lw=1)
    assert changed["label"] is None and changed["lw"] == 1


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no look for 'SVD'; there are dense, svd"):
        figures.look("SVD")


def test_kinds_of_modules_have_one_name_in_every_family() -> None:
    kind = names.module_kind
    assert kind("bert.encoder.layer.3.attention.output.dense") == "attention output"
    assert kind("bert.encoder.layer.3.output.dense") == "output"
    assert kind("mpnet.encoder.layer.0.attention.attn.q") == "queries"
    assert len(set(names.KINDS.values())) == 6
    with pytest.raises(ValueError, match="'pooler' ends in none"):
        kind("pooler")


def test_the_style_sets_the_books_colours_and_width() -> None:
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    assert colours == list(figures.COLORS.values()) and len(set(colours)) == 8
    assert plot().get_size_inches()[0] == figures.WIDTH
