"""One look for all plots; none is shown without a text for those who cannot see it."""

from base64 import b64encode
from io import BytesIO

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display
from matplotlib.figure import Figure

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
WIDTH = 7.0  # inches; wider ones are cut off on the page
DPI = 160


def use_style() -> None:
    """Set the book's look for every figure made from here on."""
    mpl.rcParams.update(
        {
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
        figure: at most 7 inches wide.
        alt: what the figure shows, for readers who cannot see it: what is plotted
            against what, and what one would notice. At least 30 characters.

    Raises:
        ValueError: the text is too short to say anything, or the figure too wide.
    """
    if len(alt.strip()) < 30:
        raise ValueError(
            f"alt is {alt!r}; at least 30 characters that say what is shown."
        )
    width = figure.get_size_inches()[0]
    if width > WIDTH:
        raise ValueError(f"the figure is {width} in wide; at most {WIDTH} is allowed.")
    buffer = BytesIO()
    # No software version in the file: the same plot gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    display(
        {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure>"},
        raw=True,
        metadata={"image/png": {"alt": alt.strip(), "width": round(96 * width)}},
    )
