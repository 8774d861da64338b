"""Terms of the glossary, linked both ways.

In a chapter the first place of each term in running text becomes a link, which shows
the definition by `_static/definitions.js`; so does a `{term}` set by hand. The glossary
says under each term which chapters use it.
"""

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

GLOSSARY, CHAPTERS = "book/glossary", "book/chapters/"
# Words with another sense as well, and the chapters where they have the glossary's.
ONLY_IN = {
    "learnt": {"7"},
    "margin": {"7"},
    "ridge": {"9"},
    "temperature": {"5", "8"},
}
SKIP = (
    nodes.reference,
    nodes.literal,
    nodes.title,
    nodes.caption,
    nodes.math,
    nodes.raw,
    nodes.table,
)
KEPT = '<div class="definition" role="tooltip" id="definition-{0}">{1}</div>'


def defined(app: Sphinx) -> dict[str, tuple[str, nodes.definition]]:
    """Each name of a term, in small letters: its anchor, and what it means."""
    found = {}
    for item in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        (meaning,) = item.findall(nodes.definition)
        for term in item.findall(nodes.term):
            names = term.astext().partition(" (")[0].split(", ")
            found |= {name.lower(): (term["ids"][0], meaning) for name in names}
    return found


def running_text(document: nodes.document) -> Iterator[nodes.Text]:
    for text in list(document.findall(nodes.Text)):
        above, node = [], text.parent
        while node is not None:
            above.append(node)
            node = node.parent
        if any(isinstance(n, nodes.paragraph) for n in above) and not any(
            isinstance(n, SKIP)
            or (isinstance(n, pending_xref) and n["reftype"] != "term")
            or "cell_output" in n.get("classes", [])
            for n in above
        ):
            yield text


def first_places(
    document: nodes.document, names: list[str], chapter: str
) -> Iterator[tuple[nodes.Text, list[tuple[str, re.Match[str]]]]]:
    """Texts in which terms stand for the first time, with what was found there."""
    allowed = [name for name in names if chapter in ONLY_IN.get(name, {chapter})]
    words = "|".join(sorted(map(re.escape, allowed), key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])({words})s?(?![\w-])", re.IGNORECASE)
    seen = set()
    for text in running_text(document):
        found = []
        for match in pattern.finditer(text.astext()):
            name = match[1].lower()
            if name not in seen:
                found.append((name, match))
                seen.add(name)
        if found:
            yield text, found


def link_terms(app: Sphinx, document: nodes.document, page: str) -> None:
    terms = defined(app)
    address = app.builder.get_relative_uri(page, GLOSSARY)
    linked = set()
    for link in document.findall(nodes.reference):  # set by hand
        uri = link.get("refuri", "")
        if uri.startswith(f"{address}#term-") and uri not in linked:
            linked.add(uri)
            link["ids"].append(f"use-{uri.partition('#')[2]}")
    for text, found in first_places(document, list(terms), number(page)):
        words, parts, end = text.astext(), [], 0
        for name, match in found:
            uri = f"{address}#{terms[name][0]}"
            if uri in linked:
                continue
            linked.add(uri)
            parts.append(nodes.Text(words[end : match.start()]))
            link = nodes.reference("", match[0], refuri=uri, internal=True)
            link["classes"].append("std-term")
            link["ids"].append(f"use-{terms[name][0]}")
            parts.append(link)
            end = match.end()
        text.parent.replace(text, [*parts, nodes.Text(words[end:])])


def number(page: str) -> str:
    return str(int(page.removeprefix(CHAPTERS)[:2]))


def link_chapters(app: Sphinx, document: nodes.document) -> None:
    """Say below each definition which chapters use the term."""
    terms = defined(app)
    uses: dict[str, dict[str, str]] = {}  # anchor of the term: {number: address}
    for page in sorted(app.env.found_docs):
        if page.startswith(CHAPTERS):
            uri = app.builder.get_relative_uri(GLOSSARY, page)
            tree = app.env.get_doctree(page)
            for _, found in first_places(tree, list(terms), number(page)):
                for name, _ in found:
                    uses.setdefault(terms[name][0], {})[number(page)] = uri
    for item in document.findall(nodes.definition_list_item):
        anchor = next(item.findall(nodes.term))["ids"][0]
        if anchor not in uses:
            continue
        line = nodes.paragraph("", "Used in chapter ", classes=["glossary-uses"])
        for position, (chapter, uri) in enumerate(uses[anchor].items()):
            if position:
                line += nodes.Text(", ")
            place = f"{uri}#use-{anchor}"
            line += nodes.reference("", chapter, refuri=place, internal=True)
        next(item.findall(nodes.definition)).append(line)


def resolve(app: Sphinx, document: nodes.document, page: str) -> None:
    if page == GLOSSARY:
        link_chapters(app, document)
    elif page.startswith(CHAPTERS):
        link_terms(app, document, page)


def keep_definitions(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Put the definitions of linked terms at the end of the page, unseen."""
    body = context.get("body", "")
    used = set(re.findall(r'href="[^"]*glossary\.html#(term-[^"]+)"', body))
    if page == GLOSSARY or not used:
        return
    meanings = dict(defined(app).values())
    kept = "".join(
        KEPT.format(anchor, html(app, meanings[anchor])) for anchor in sorted(used)
    )
    context["body"] = body + kept
    if 'class="math' in kept:  # then this page needs MathJax, if it did not before
        app.env.get_domain("math").data["has_equations"][page] = True
    app.add_js_file("definitions.js", defer="defer")


def html(app: Sphinx, meaning: nodes.definition) -> str:
    """What a definition says, without the mark of a list's item."""
    return "".join(app.builder.render_partial(part)["fragment"] for part in meaning)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", resolve)
    # before MathJax and the tidying ask whether there are formulas
    app.connect("html-page-context", keep_definitions, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
