"""Draw the logo and the favicon: a matrix, and the two thin ones that replace it.

python book/make_logo.py   # writes book/_static/{logo,logo-dark,favicon}.svg
"""

from pathlib import Path

STATIC = Path(__file__).resolve().parent / "_static"
BLUE, ORANGE = "#0072B2", "#D55E00"


def grid(x: float, y: float, columns: int, rows: int, cell: float, color: str) -> str:
    """A block of cells, fainter away from its upper left corner."""
    rects = []
    for i in range(rows):
        for j in range(columns):
            opacity = 1 - 0.6 * (i + j) / max(1, rows + columns - 2)
            rects.append(
                f'<rect x="{x + j * cell:g}" y="{y + i * cell:g}" '
                f'width="{cell - 1:g}" height="{cell - 1:g}" rx="1" '
                f'fill="{color}" opacity="{opacity:.2f}"/>'
            )
    return "".join(rects)


def svg(width: int, height: int, body: str) -> str:
    """Wrap shapes into a document with a title."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">'
        f"<title>The DRONE Book</title>{body}</svg>\n"
    )


def logo(ink: str) -> str:
    """W ≈ A B, with the book's name under it."""
    text = 'text-anchor="middle" font-family="Georgia, serif"'
    return svg(
        200,
        104,
        grid(8, 8, 6, 6, 10, BLUE)
        + f'<text x="88" y="45" {text} font-size="26" fill="{ink}">≈</text>'
        + grid(106, 8, 2, 6, 10, ORANGE)
        + grid(132, 8, 6, 2, 10, ORANGE)
        + f'<text x="100" y="95" {text} font-size="20" fill="{ink}">'
        "The DRONE Book</text>",
    )


def favicon() -> str:
    """The two thin matrices alone."""
    return svg(32, 32, grid(2, 2, 2, 6, 4.7, BLUE) + grid(13, 2, 4, 2, 4.7, ORANGE))


if __name__ == "__main__":
    STATIC.mkdir(exist_ok=True)
    (STATIC / "logo.svg").write_text(logo("#222222"), encoding="utf-8")
    (STATIC / "logo-dark.svg").write_text(logo("#eeeeee"), encoding="utf-8")
    (STATIC / "favicon.svg").write_text(favicon(), encoding="utf-8")
