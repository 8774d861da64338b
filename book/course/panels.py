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


def halves(svg: str) -> list[str]:
    """The upper and the lower panels of a tall figure, else the figure as it is."""
    size = SIZE.search(svg)
    if size is None:
        raise ValueError("this SVG does not begin as those of Matplotlib do.")
    width, height = float(size[1]), float(size[2])
    rows = sorted({(float(top), float(bottom)) for bottom, top in PANEL.findall(svg)})
    if height < TALL * width or len(rows) < 2:
        return [svg]
    gaps = [(above[1] + below[0]) / 2 for above, below in pairwise(rows)]
    cut = min(gaps, key=lambda gap: abs(gap - height / 2))
    return [
        _band(svg, size[0], width, top, bottom)
        for top, bottom in ((0, cut), (cut, height))
    ]


def _band(svg: str, size: str, width: float, top: float, bottom: float) -> str:
    """The part of the figure between two heights, in points from the top."""
    high = bottom - top
    shown = f'width="{width}pt" height="{high}pt" viewBox="0 {top} {width} {high}"'
    return svg.replace(size, shown, 1)
