"""One look for all plots; none is shown without a text for those who cannot see it.

`style()` once at a notebook's top; then `look("svd")` gives a method its colour, marker
and line, the same in every chapter.
"""

from base64 import b64encode
from io import BytesIO
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display
from matplotlib.figure import Figure

from drone.lab.names import METHODS

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#E69F00",
    "black": "#000000",
    "grey": "#767676",
}
# Key of a method → colour, marker, line. A colour is one method's; the lines that
# methods are read against are black or grey and have no marker.
LOOKS = {
    "dense": (COLORS["black"], "*", "-"),
    "svd": (COLORS["orange"], "o", "-"),
    "drone": (COLORS["blue"], "s", "-"),
    "theorem1": (COLORS["purple"], "^", "-."),
    "algorithm2": ("#44357F", "D", "-"),
    "product": ("#882255", "p", "--"),
    "inputs": (COLORS["green"], "v", "--"),
    "whitened": ("#8C510A", "X", "-."),
    "layers": (COLORS["yellow"], "h", "--"),
    "int8": (COLORS["sky"], "P", "-"),
    "asvd": ("#999933", "<", "-"),
    "fwsvd": ("#CC6677", ">", "-"),
    "weighted": ("#117733", "d", "--"),
    "both": ("#661100", "8", "--"),
    "sequential": ("#6699CC", "H", "-."),
    "shifted": ("#AA4499", "+", "-"),
    "shifted_both": ("#E7298A", "1", "-"),
    "shared": ("#44AA99", "x", "-."),
    "pruned": ("#A65628", "2", "--"),
    "bound": (COLORS["black"], "", "--"),
    "majority": (COLORS["grey"], "", ":"),
    "break-even": (COLORS["grey"], "", "--"),
    "noise": (COLORS["grey"], "", "-."),
}
WIDTH = 7.0  # inches; wider ones are cut off on the page
DPI = 160
# Letters of 10.5 points on a drawing this wide are still 10 pixels high on a phone.
COLUMN = 5.2  # inches


def look(method: str, **changes: Any) -> dict[str, Any]:
    """Return how a method is drawn, for `axis.plot(x, y, **look("svd"))`.

    Args:
        method: a key of `LOOKS`.
        changes: what is to be otherwise here, such as `label=None` or `marker=""`.

    Raises:
        ValueError: no such method.
    """
    if method not in LOOKS:
        raise ValueError(f"no look for {method!r}; there are {', '.join(LOOKS)}.")
    color, marker, line = LOOKS[method]
    drawn = {"color": color, "marker": marker, "ls": line, "label": METHODS[method]}
    return drawn | changes


def style() -> None:
    """Set the book's look for every figure made from here on: SVG, legible on a phone.

    White paper, in dark mode too: the page puts a light card behind.
    """
    use_style()
    mpl.rcParams.update(
        {
            "savefig.format": "svg",
            "svg.fonttype": "path",  # letters look the same wherever it is shown
            "svg.hashsalt": "drone",  # the same plot gives the same names inside
            "figure.figsize": (COLUMN, 3.3),
            "font.size": 10.5,
            "axes.titlesize": 10.5,
            "legend.fontsize": 9.5,
        }
    )


def use_style() -> None:
    """Set the older look, PNG and seven inches wide, of chapters not yet redrawn."""
    mpl.rcParams.update(
        {
            "savefig.format": "png",
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": DPI,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=list(COLORS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
            "axes.titlesize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 4,
        }
    )


def show(figure: Figure, alt: str) -> None:
    """Show a figure, with the text that stands for it, and close it.

    Args:
        figure: at most 5.2 inches wide after `style()`, 7 after `use_style()`.
        alt: what the figure shows, for readers who cannot see it: what is plotted
            against what, and what one would notice. At least 30 characters.

    Raises:
        ValueError: the text is too short to say anything, or the figure too wide.
    """
    if len(alt.strip()) < 30:
        raise ValueError(
            f"alt is {alt!r}; at least 30 characters that say what is shown."
        )
    vector = mpl.rcParams["savefig.format"] == "svg"
    width, most = figure.get_size_inches()[0], COLUMN if vector else WIDTH
    if width > most:
        raise ValueError(f"the figure is {width} in wide; at most {most} is allowed.")
    buffer = BytesIO()
    # No date and no software version in the file: the same plot gives the same bytes.
    if vector:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        kind, picture = "image/svg+xml", buffer.getvalue().decode()
    else:
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        kind, picture = "image/png", b64encode(buffer.getvalue()).decode()
    plt.close(figure)
    display(
        {kind: picture, "text/plain": "<Figure>"},
        raw=True,
        metadata={kind: {"alt": alt.strip(), "width": round(96 * width)}},
    )
