"""Draw the logo and the favicon: a matrix, and the two thin ones that replace it.

python book/make_logo.py   # writes book/_static/{logo,logo-dark,favicon}.svg
                           # and preview.png, what a shared link shows (by Chromium)
"""

import shutil
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


def preview() -> str:
    """What a shared link shows: the logo, the name, what the book is about."""
    text = 'font-family="DejaVu Sans, sans-serif" fill="#222222"'
    lines = [
        "Make a language model smaller and faster,",
        "know what it costs, prove it.",
    ]
    return svg(
        1200,
        630,
        '<rect width="1200" height="630" fill="#ffffff"/>'
        + grid(90, 90, 6, 6, 40, BLUE)
        + f'<text x="390" y="235" {text} font-size="90">≈</text>'
        + grid(510, 90, 2, 6, 40, ORANGE)
        + grid(620, 90, 6, 2, 40, ORANGE)
        + f'<text x="90" y="430" {text} font-size="72" font-weight="bold">'
        "The DRONE Book</text>"
        + "".join(
            f'<text x="90" y="{500 + 52 * row}" {text} font-size="38">{line}</text>'
            for row, line in enumerate(lines)
        ),
    )


def save_preview(path: Path) -> None:
    """Draw the preview with Chromium: networks show no SVG."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("preview.png is drawn by Chromium, and there is none.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 630})
        page.set_content(f"<style>body {{ margin: 0 }}</style>{preview()}")
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    STATIC.mkdir(exist_ok=True)
    (STATIC / "logo.svg").write_text(logo("#222222"), encoding="utf-8")
    (STATIC / "logo-dark.svg").write_text(logo("#eeeeee"), encoding="utf-8")
    (STATIC / "favicon.svg").write_text(favicon(), encoding="utf-8")
    save_preview(STATIC / "preview.png")
