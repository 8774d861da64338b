"""Make the whole book one EPUB: `make epub`.

    python -m book.make_epub   # the built site into _build/html/drone-book.epub

The pages are those of the PDF, made ready in Chromium. There MathJax writes each
formula as MathML, and the page writes itself as XHTML; here they are packed.
"""

import mimetypes
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from urllib.parse import unquote, urljoin

import yaml

from book.open_site import BOOK, ROOT, SITE, chromium_at, listed, open_page

EPUB = SITE / "drone-book.epub"
# A reader of e-books folds and runs nothing; what is folded is left out, as in print.
TO_XHTML = """() => {
  const article = document.querySelector("article");
  const items = window.MathJax?.startup?.document?.math ?? [];
  for (const item of items) {
    const made = MathJax.startup.toMML(item.root);
    const read = new DOMParser().parseFromString(made, "application/xml");
    const math = read.documentElement;
    for (const node of [math, ...math.querySelectorAll("*")]) {
      for (const name of node.getAttributeNames()) {
        if (name.startsWith("data-") || name === "class") node.removeAttribute(name);
      }
    }
    item.typesetRoot.replaceWith(document.importNode(math, true));
  }
  article.querySelectorAll(
    ".headerlink, .toggle-button, button, script, style, input, svg, template," +
    ".definition, .above-output-prompt, .drone-toy, .rank-figure," +
    "details.hide:not([open]), details.results-all:not([open])"
  ).forEach((node) => node.remove());
  article.querySelectorAll("pre").forEach((node) => {
    node.textContent = node.textContent;  // no colours: light, and dark on any ground
  });
  const seen = new Set();
  for (const node of article.querySelectorAll("*")) {
    if (node.namespaceURI !== "http://www.w3.org/1999/xhtml") continue;
    for (const name of node.getAttributeNames()) {
      if (!["id", "class", "href", "src", "alt", "title", "colspan", "rowspan", "start",
        "lang", "scope"].includes(name)) node.removeAttribute(name);
    }
    if (node.id && seen.has(node.id)) node.removeAttribute("id");
    seen.add(node.id);
  }
  return [article.querySelector("h1").firstChild.textContent.trim(),
    [...article.childNodes].map((node) => new XMLSerializer().serializeToString(node))
      .join(""),
    [...article.querySelectorAll("img")].map((image) => image.getAttribute("src"))];
}"""
STYLE = """body { line-height: 1.45 }
img { max-width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.75em }
code { overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 0.75em }
td, th { padding: 0.15em 0.4em; text-align: right; vertical-align: top }
td, th { border-bottom: 1px solid #999 }
th:first-child, td:first-child { text-align: left }
caption { text-align: left; font-weight: bold }
math[display="block"] { margin: 0.8em 0 }
.admonition, .proof, .claim { border-left: 3px solid #777; padding-left: 0.8em }
.admonition-title { font-weight: bold }
.chip, .sd-badge { font-weight: bold; border: 1px solid; border-radius: 0.3em }
.chip, .sd-badge { padding: 0 0.3em; margin-right: 0.3em }
.claim dt { font-weight: bold }
.claim dd { margin-left: 1em }
figcaption { font-size: 0.9em }
h1, h2, h3 { break-after: avoid }
"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml"
 xmlns:epub="http://www.idpf.org/2007/ops" lang="en" xml:lang="en">
<head><title>{title}</title>
<link rel="stylesheet" type="text/css" href="style.css"/></head>
<body>{body}</body>
</html>
"""
XHTML = "application/xhtml+xml"
COVER = "<h1>{title}</h1><p>{author}</p><p>{copyright}</p>"
CONTAINER = """<?xml version="1.0" encoding="utf-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="book/package.opf"
 media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""
PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0"
 unique-identifier="id" xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">{url}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:creator>{author}</dc:creator>
<dc:rights>{copyright}</dc:rights>
<dc:language>en</dc:language>
<meta property="dcterms:modified">{modified}</meta>
</metadata>
<manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="style" href="style.css" media-type="text/css"/>
{items}
</manifest>
<spine>
<itemref idref="cover"/>
<itemref idref="nav"/>
{spine}
</spine>
</package>
"""


@dataclass(frozen=True)
class Chapter:
    """A page of the site: its title, its body as XHTML, the images it shows."""

    title: str
    body: str
    images: list[str]


def read_pages(site: Path, names: list[str]) -> dict[str, Chapter]:
    """Pages of the site, each as XHTML."""
    read = {}
    with chromium_at(site) as (page, address):
        for name in names:
            open_page(page, address, name, set())
            title, body, images = page.evaluate(TO_XHTML)
            read[name] = Chapter(title, body, images)
            print(name, flush=True)
    return read


def file_of(name: str) -> str:
    """The file of a page: all lie in one folder."""
    return name.removeprefix("book/").replace("/", "-") + ".xhtml"


def image_at(page: str, source: str) -> tuple[str, str]:
    """An image's path in the site, and its path in the EPUB."""
    path = unquote(urljoin(f"{page}.html", source))
    return path, "images/" + Path(path).name


def set_links(name: str, pages: Mapping[str, Chapter], url: str) -> str:
    """A body whose links lead within the EPUB or to the site; its images lie beside."""

    def link(found: re.Match[str]) -> str:
        path, _, anchor = found[1].partition("#")
        target = path.removesuffix(".html")
        if target not in pages:
            return f'href="{url}{found[1]}"'
        known = f'id="{unquote(anchor)}"' in pages[target].body
        return f'href="{file_of(target)}{"#" + anchor if anchor and known else ""}"'

    body = re.sub(rf'href="{re.escape(BOOK)}([^"]*)"', link, pages[name].body)
    for source in set(pages[name].images):
        body = body.replace(f'src="{source}"', f'src="{image_at(name, source)[1]}"')
    return body


def files_of(
    site: Path, parts: Mapping[str, list[str]], url: str, modified: str
) -> dict[str, str | bytes]:
    """All files of the folder `book` in the EPUB."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    said = {key: escape(config[key]) for key in ("title", "author", "copyright")}
    pages = read_pages(site, [name for names in parts.values() for name in names])
    made: dict[str, str | bytes] = {
        "style.css": STYLE,
        "cover.xhtml": PAGE.format(title=said["title"], body=COVER.format(**said)),
        "nav.xhtml": PAGE.format(title="Contents", body=contents(parts, pages)),
    }
    items = [item("cover", "cover.xhtml", XHTML)]
    spine = []
    for name, chapter in pages.items():
        file, body = file_of(name), set_links(name, pages, url)
        made[file] = PAGE.format(title=escape(chapter.title), body=body)
        spine.append(f'<itemref idref="page-{len(spine)}"/>')
        mark = "mathml" if "<math" in body else ""
        items.append(item(f"page-{len(spine) - 1}", file, XHTML, mark))
        for source in chapter.images:
            path, file = image_at(name, source)
            if file not in made:
                made[file] = (site / path).read_bytes()
                kind = str(mimetypes.guess_type(file)[0])
                items.append(item(f"image-{len(items)}", file, kind))
    made["package.opf"] = PACKAGE.format(
        **said,
        url=url,
        modified=modified,
        items="\n".join(items),
        spine="\n".join(spine),
    )
    return made


def contents(parts: Mapping[str, list[str]], pages: Mapping[str, Chapter]) -> str:
    """The contents, by part, with a link to each page."""
    made = ""
    for part, names in parts.items():
        made += f"<li><span>{escape(part)}</span><ol>"
        for name in names:
            title = escape(pages[name].title)
            made += f'<li><a href="{file_of(name)}">{title}</a></li>'
        made += "</ol></li>"
    return f'<nav epub:type="toc"><h1>Contents</h1><ol>{made}</ol></nav>'


def item(identifier: str, file: str, kind: str, properties: str = "") -> str:
    """A line of the list of files."""
    mark = f' properties="{properties}"' if properties else ""
    return f'<item id="{identifier}" href="{file}" media-type="{kind}"{mark}/>'


def write(files: Mapping[str, str | bytes], path: Path) -> None:
    """Pack the files. The first names the format and is not compressed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(
            zipfile.ZipInfo("mimetype"), "application/epub+zip", zipfile.ZIP_STORED
        )
        for name, content in {
            "META-INF/container.xml": CONTAINER,
            **{f"book/{name}": content for name, content in files.items()},
        }.items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def main() -> None:
    """Pack the built site."""
    if not (SITE / "index.html").is_file():
        raise SystemExit(f"{SITE}: no site; build it first, with `make book`.")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    built = (SITE / "index.html").stat().st_mtime
    modified = f"{datetime.fromtimestamp(built, UTC):%Y-%m-%dT%H:%M:%SZ}"
    write(files_of(SITE, listed(), config["html"]["baseurl"], modified), EPUB)
    size = EPUB.stat().st_size / 1e6
    print(f"written: {EPUB.relative_to(ROOT)}, {size:.1f} MB")


if __name__ == "__main__":
    main()
