"""Print the whole book into one PDF: `make pdf`.

    python -m book.make_pdf   # the built site into _build/html/drone-book.pdf

Chromium prints one page of the site after another with the style for paper in
`_static/custom.css`; pypdf joins them, and gives them numbers, an outline and links
that lead from page to page within the file. Printed as one page, the book did not
come out of Chromium in an hour.
"""

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

import yaml
from playwright.sync_api import Page
from pypdf import PdfReader, PdfWriter
from pypdf.constants import PageLabelStyle
from pypdf.generic import ArrayObject, NameObject, NullObject

from book.open_site import BOOK, ROOT, SITE, anchors, chromium_at, listed, open_page

PDF = SITE / "drone-book.pdf"
MARGINS = {"top": "16mm", "bottom": "16mm", "left": "14mm", "right": "14mm"}
NUMBER = '<p style="font-size: 8pt; width: 100%; text-align: center">{}</p>'
FRONT = """<!doctype html><html lang="en"><title>{title}</title><style>
  @page {{ size: A4; margin: 20mm }}
  body {{ font: 10pt/1.45 sans-serif }}
  h1 {{ font-size: 30pt; margin: 55mm 0 6mm }}
  .cover {{ break-after: page; font-size: 13pt }}
  h2 {{ font-size: 12pt; margin: 5mm 0 1mm }}
  p {{ margin: 0 }}
  .line {{ display: flex; justify-content: space-between; gap: 1em }}
  a {{ color: inherit; text-decoration: none }}
</style>
<div class="cover"><h1>{title}</h1><p>{claim}</p><p style="margin-top: 20mm">
{author}<br>{copyright}<br><a href="{url}">{url}</a></p></div>
<h1 style="font-size: 20pt; margin: 0">Contents</h1>{contents}</html>"""


def print_pages(site: Path, parts: Mapping[str, list[str]]) -> dict[str, PdfReader]:
    """Print pages of the site, each into a PDF of its own."""
    names = [name for part in parts.values() for name in part]
    wanted = anchors(site, names)
    printed = {}
    with chromium_at(site) as (page, address):
        for name in names:
            open_page(page, address, name, wanted[name])
            printed[name] = to_pdf(page)
            print(f"{name}: {len(printed[name].pages)} pages", flush=True)
    return printed


def to_pdf(page: Page, number: bool = False) -> PdfReader:
    """What Chromium prints of the page that is open."""
    made = page.pdf(
        prefer_css_page_size=True,
        format="A4",
        margin=MARGINS,
        outline=True,
        tagged=True,  # without tags no outline
        display_header_footer=number,
        header_template="<p></p>",
        footer_template=NUMBER.format('<span class="pageNumber"></span>'),
    )
    return PdfReader(io.BytesIO(made))


def front_matter(
    parts: Mapping[str, list[str]], titles: Mapping[str, str], first: Mapping[str, int]
) -> str:
    """Cover and contents; `first` is the number of each page's first sheet."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    lines = []
    for part, names in parts.items():
        lines.append(f"<h2>{escape(part)}</h2>")
        lines += [
            f'<p class="line"><a href="{BOOK}{name}.html">{escape(titles[name])}</a>'
            f"<span>{first[name]}</span></p>"
            for name in names
        ]
    return FRONT.format(
        title=escape(config["title"]),
        claim=escape(config["sphinx"]["config"]["ogp_image_alt"].partition(": ")[2]),
        author=escape(config["author"]),
        copyright=escape(config["copyright"]),
        url=config["html"]["baseurl"],
        contents="".join(lines),
    )


def join(site: Path, parts: Mapping[str, list[str]], url: str) -> PdfWriter:
    """All pages as one document, with cover, contents, numbers, outline and links."""
    printed = print_pages(site, parts)
    first, total = {}, 0
    for name, reader in printed.items():
        first[name] = total + 1
        total += len(reader.pages)
    titles = {name: str(reader.outline[0].title) for name, reader in printed.items()}
    with chromium_at(site) as (page, _):
        page.set_content(front_matter(parts, titles, first))
        front = to_pdf(page)
        page.set_content(
            "<p style='break-after: page'>&nbsp;</p>" * (total - 1) + "&nbsp;"
        )
        numbers = to_pdf(page, number=True)

    book = PdfWriter()
    places = {}  # (page, anchor): sheet, and how far from its left and its bottom
    for name, reader in [("", front), *printed.items()]:
        start = len(book.pages)
        places[name, ""] = start, NullObject(), NullObject()
        for anchor, to in reader.named_destinations.items():
            sheet = start + (reader.get_destination_page_number(to) or 0)
            places[name, anchor.removeprefix("/")] = sheet, to.left, to.top
        reader.root_object.pop("/Dests", None)  # names are each page's own
        book.append(reader, import_outline=bool(name))
    before = len(front.pages)
    for sheet, number in zip(book.pages[before:], numbers.pages, strict=True):
        sheet.merge_page(number)
        sheet.compress_content_streams()
    resolve(book, places, url)
    book.set_page_label(0, before - 1, style=PageLabelStyle.LOWERCASE_ROMAN)
    book.set_page_label(before, len(book.pages) - 1, style=PageLabelStyle.DECIMAL)
    book.compress_identical_objects()
    return book


def resolve(
    book: PdfWriter, places: Mapping[tuple[str, str], tuple[int, ...]], url: str
) -> None:
    """Let each link of the book lead to a sheet; what is on the site alone, there."""
    for sheet in book.pages:
        for reference in sheet.get("/Annots", []):
            link = reference.get_object()
            address = link.get("/A", {}).get("/URI", "")
            if not address.startswith(BOOK):
                continue
            path, _, anchor = address.removeprefix(BOOK).partition("#")
            name = path.removesuffix(".html")
            place = places.get((name, anchor), places.get((name, "")))
            if place is None:
                link["/A"][NameObject("/URI")] = type(address)(
                    url + address.removeprefix(BOOK)
                )
                continue
            number, left, top = place
            del link["/A"]
            target = book.pages[number].indirect_reference
            link[NameObject("/Dest")] = ArrayObject(
                [target, NameObject("/XYZ"), left, top, NullObject()]
            )


def main() -> None:
    """Print the built site."""
    if not (SITE / "index.html").is_file():
        raise SystemExit(f"{SITE}: no site; build it first, with `make book`.")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    book = join(SITE, listed(), config["html"]["baseurl"])
    book.add_metadata({"/Title": config["title"], "/Author": config["author"]})
    book.write(PDF)
    print(f"written: {PDF.relative_to(ROOT)}, {len(book.pages)} pages")


if __name__ == "__main__":
    main()
