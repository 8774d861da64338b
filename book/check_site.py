"""Is the site whole? Pages, PDF and EPUB are there, and none is a stub.

    python -m book.check_site   # before a deploy; stops with what is missing

The least sizes are about half of what a whole book has: they tell a file that was cut
short or is empty, and let the book shrink.
"""

from pathlib import Path

from book.open_site import ROOT, SITE, contents

PAGE = 15_000  # bytes; the theme alone is more
LEAST = {
    "drone-book.pdf": 2_000_000,
    "drone-book.epub": 1_000_000,
    "searchindex.js": 50_000,
    "sitemap.xml": 1_000,
}


def faults(site: Path, root: Path = ROOT) -> list[str]:
    """What is not there or too small: a line each."""
    pages = [name for part in contents(root).values() for name in part]
    least = {f"{name}.html": PAGE for name in ["book/intro", *pages]} | LEAST
    chapters = [Path(name).stem for name in pages if "/chapters/" in name]
    least |= {f"notebooks/{chapter}.ipynb": 5_000 for chapter in chapters}
    found = []
    for name, size in least.items():
        path = site / name
        if not path.is_file():
            found.append(f"{name}: is missing")
        elif path.stat().st_size < size:
            found.append(f"{name}: {path.stat().st_size} bytes, less than {size}")
    return found


def main() -> None:
    """Judge the built site."""
    found = faults(SITE)
    if found:
        raise SystemExit("The site is not whole:\n" + "\n".join(found))
    print("The site is whole.")


if __name__ == "__main__":
    main()
