"""Claims of the paper, each with a verdict that a chapter computed.

In the ledger, under a heading:

    ```{claim} headline
    :short: 1.92× on MRPC
    :judged: 05-algorithm-2 headline_agrees
    :written-for: undecided
    :theirs: 1.92×, for 1.5 points
    :ours: {glue:text}`…`
    Two sentences.
    ```

and on any page `{verdicts}` lists all of them, short, with links. The words of a
verdict come from the chapter's `glue`; WORDS says what they mean, others are an error.
A number that the finished cases gave is written `{case}`name:.1f`` on any page.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import OptionSpec

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"
UNDECIDED, WAITS = "undecided", "waits for a GPU"
WORDS = {
    "yes": REPRODUCED,
    "no": NOT,
    "within the clock's noise": UNDECIDED,
    "not decided": UNDECIDED,
    "too few tasks": UNDECIDED,
}
CASES = (  # written by book/evidence.py and by book/onnx_clock.py
    Path("book", "results", "evidence.json"),
    Path("book", "results", "onnx.json"),
)
RECORD = "application/papermill.record/text/plain"


@dataclass
class Claim:
    page: str
    anchor: str
    short: str
    verdict: str


class ClaimDirective(SphinxDirective):
    """The body of a claim: a chip, their result, ours, what it means, where it is."""

    required_arguments = 1  # its anchor
    has_content = True
    option_spec: ClassVar[OptionSpec] = {
        "short": directives.unchanged_required,  # a few words for the strip
        "judged": directives.unchanged_required,  # a chapter, keys of its glue
        "proved": directives.flag,  # one half of the claim; a chapter has the proof
        "waits": directives.flag,  # nothing has judged it yet
        "written-for": directives.unchanged_required,  # the verdict the text is about
        "theirs": directives.unchanged_required,
        "ours": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        anchor = self.arguments[0]
        chapter, _, keys = self.options["judged"].partition(" ")
        path = Path(self.env.srcdir, "book", "chapters", f"{chapter}.ipynb")
        self.env.note_dependency(str(path))
        cell, said = glued(path, keys.split())
        place = to_cell(self.env, chapter, cell)
        if "proved" in self.options:
            said.append("yes")
        found = WAITS if "waits" in self.options else verdict(said)
        if found != self.options["written-for"]:
            raise self.error(
                f"{anchor}: {chapter} now says {found!r}, and the text was written for "
                f"{self.options['written-for']!r}; read it again, then change both."
            )
        claim = Claim(self.env.docname, anchor, self.options["short"], found)
        claims(self.env)[anchor] = claim

        box = nodes.container(ids=[anchor], classes=["claim", css(found)])
        self.set_source_info(box)
        top = nodes.paragraph("", "", chip(found), classes=["claim-verdict"])
        box += top
        pairs = nodes.definition_list(classes=["claim-numbers"])
        for name in ("theirs", "ours"):
            text, messages = self.state.inline_text(self.options[name], self.lineno)
            definition = nodes.definition("", nodes.paragraph("", "", *text))
            term = nodes.term("", {"theirs": "The paper", "ours": "Here"}[name])
            pairs += nodes.definition_list_item("", term, definition)
            box += messages
        box += pairs
        self.state.nested_parse(self.content, self.content_offset, box)
        box += nodes.paragraph("", "", place)
        return [box]


def to_cell(env: BuildEnvironment, chapter: str, cell: str) -> nodes.reference:
    here = env.app.builder.get_target_uri(env.docname)
    up = "../" * here.count("/")
    uri = f"{up}book/chapters/{chapter}.html#cell-{cell}"
    text = f"The cell in chapter {int(chapter[:2])} that judges it"
    return nodes.reference("", text, refuri=uri, internal=True)


def decided(env: BuildEnvironment) -> dict[str, Any]:
    """Read what the finished cases gave: {name: number or verdict}."""
    found: dict[str, Any] = {}
    for name in CASES:
        path = Path(env.srcdir, name)
        env.note_dependency(str(path))
        found |= json.loads(path.read_text())
    return found


class CaseRole(SphinxRole):
    """A number of the finished cases: a name, and how to write it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        name, _, spec = self.text.partition(":")
        known = decided(self.env)
        if name not in known:
            message = self.inliner.reporter.error(f"no case gave {name!r}.")
            return [], [message]
        return [nodes.Text(format(known[name], spec))], []


def glued(path: Path, keys: list[str]) -> tuple[str, list[str]]:
    """Where the first of the keys is judged, and what each of them says.

    That is the cell that glued it; or, if it is not on the page, the one before it.
    """
    found, shown = {}, ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if "remove-cell" not in cell.metadata.get("tags", []):
            shown = cell.id
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name in keys:
                found[name] = shown, output.data[RECORD].strip("'\"")
    if not keys or found.keys() != set(keys):
        raise ValueError(f"{path}: of {keys or 'no key'}, glued are {sorted(found)}.")
    return found[keys[0]][0], [found[key][1] for key in keys]


def verdict(said: list[str]) -> str:
    """One word for one or more judgements, such as 'yes' or 'minilm: not decided'."""
    each = []
    for judgement in "; ".join(said).split("; "):
        word = re.sub(r"^[\w-]+: | \(.*\)$", "", judgement)
        if word not in WORDS:
            raise ValueError(f"a verdict says {word!r}; known are {', '.join(WORDS)}.")
        each.append(WORDS[word])
    if REPRODUCED in each and len(set(each)) > 1:
        return PARTLY
    return UNDECIDED if UNDECIDED in each else each[0]


def chip(found: str) -> nodes.inline:
    return nodes.inline("", found, classes=["chip", css(found)])


def css(found: str) -> str:
    return "verdict-" + found.replace(" ", "-")


def claims(env: BuildEnvironment) -> dict[str, Claim]:
    if not hasattr(env, "ledger_claims"):
        env.ledger_claims = {}
    return env.ledger_claims


class verdicts(nodes.General, nodes.Element):
    """Where all claims are to be listed; they are known when all pages are read."""


class VerdictsDirective(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return [verdicts()]


def list_verdicts(app: Sphinx, document: nodes.document, page: str) -> None:
    for place in list(document.findall(verdicts)):
        listed = nodes.bullet_list(classes=["verdict-strip"])
        for claim in claims(app.env).values():
            uri = app.builder.get_relative_uri(page, claim.page)
            link = nodes.reference(
                "", claim.short, refuri=f"{uri}#{claim.anchor}", internal=True
            )
            line = nodes.paragraph("", "", chip(claim.verdict), nodes.Text(" "), link)
            listed += nodes.list_item("", line)
        place.replace_self(listed)


def forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    for anchor in [a for a, claim in claims(env).items() if claim.page == page]:
        del claims(env)[anchor]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(verdicts)
    app.add_role("case", CaseRole())
    app.add_directive("claim", ClaimDirective)
    app.add_directive("verdicts", VerdictsDirective)
    app.connect("doctree-resolved", list_verdicts)
    app.connect("env-purge-doc", forget)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
