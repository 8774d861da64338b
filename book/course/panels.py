"""A figure of stacked panels, cut in two: a column's shape is not a slide's."""

import re
from itertools import pairwise

TALL = 1.2  # height over width from which two halves are legible and one piece is not
SIZE = re.compile(r'width="([\d.]+)pt" height="([\d.]+)pt" viewBox="0 0 [\d.]+ [\d.]+"')
# Matplotlib draws the background of each panel first: a path around its four corners.
PANEL = re.compile(
    r'<g id="axes_\d+">\s*<g id="patch_\d+">\s*<path d="M [\d.]+ ([\d.]+) '
    r"\s*L [\d.]+ [\d.]+ \s*L [\d.]+ ([\d.]+)"
)


# A line of unrotated text: its baseline, and a hundredth of its size.
LINE = re.compile(r"translate\([\d.]+ ([\d.]+)\) scale\(([\d.]+)")
DEEP, HIGH = 30, 100  # hundredths of its size that a letter reaches down and up


def halves(svg: str) -> list[str]:
    """The upper and the lower panels of a tall figure, else the figure as it is."""
    size = SIZE.search(svg)
    if size is None:
        raise ValueError("this SVG does not begin as those of Matplotlib do.")
    width, height = float(size[1]), float(size[2])
    rows = sorted({(float(top), float(bottom)) for bottom, top in PANEL.findall(svg)})
    if height < TALL * width or len(rows) < 2:
        return [svg]
    gaps = [_clear(svg, above[1], below[0]) for above, below in pairwise(rows)]
    cut = min(gaps, key=lambda gap: abs(gap - height / 2))
    return [
        _band(svg, size[0], width, top, bottom)
        for top, bottom in ((0, cut), (cut, height))
    ]


def _clear(svg: str, bottom: float, top: float) -> float:
    """A height between two rows of panels that runs through no panel's words.

    The upper row ends at `bottom`, the lower one begins at `top`.
    """
    low, high = bottom, top
    for axes in re.split(r'(?=<g id="axes_\d+">)', svg)[1:]:
        panel = PANEL.match(axes)
        lines = [(float(y), float(size)) for y, size in LINE.findall(axes)]
        between = [(y, size) for y, size in lines if bottom < y < top]
        if panel and float(panel[1]) <= bottom:
            low = max([low, *(y + DEEP * size for y, size in between)])
        else:
            high = min([high, *(y - HIGH * size for y, size in between)])
    return (low + high) / 2


def _band(svg: str, size: str, width: float, top: float, bottom: float) -> str:
    """The part of the figure between two heights, in points from the top."""
    high = bottom - top
    shown = f'width="{width}pt" height="{high}pt" viewBox="0 {top} {width} {high}"'
    return svg.replace(size, shown, 1)
