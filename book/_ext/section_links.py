"""Link to a section of a chapter by its number: `{section}`10.2``.

The chapter is the one whose file begins with the number before the point; its section
is looked up when all pages are read, so that a number that is gone stops the build.
"""

from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole


class section_link(nodes.Inline, nodes.TextElement):
    """Where a link is to stand; its text is the number of the section."""


class SectionRole(SphinxRole):
    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        link = section_link(self.rawtext, self.text)
        self.set_source_info(link)
        return [link], []


def headings(app: Sphinx, chapter: int) -> Iterator[tuple[str, str, str]]:
    """Page, id and title of each section of a chapter."""
    for page in sorted(app.env.found_docs):
        if page.startswith(f"book/chapters/{chapter:02}-"):
            for section in app.env.get_doctree(page).findall(nodes.section):
                yield page, section["ids"][0], section[0].astext()


def fill(app: Sphinx, document: nodes.document, page: str) -> None:
    for place in list(document.findall(section_link)):
        number = place.astext()
        chapter = number.partition(".")[0]
        if not chapter.isdigit():
            raise ValueError(f"{page}: no section {number!r}; 10.2 is such a number.")
        for target, anchor, title in headings(app, int(chapter)):
            if title.startswith(f"{number} "):
                uri = app.builder.get_relative_uri(page, target)
                link = nodes.reference(
                    "", number, refuri=f"{uri}#{anchor}", internal=True
                )
                link["reftitle"] = title
                place.replace_self(link)
                break
        else:
            raise ValueError(f"{page}: no chapter has a section {number}.")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(section_link)
    app.add_role("section", SectionRole())
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
