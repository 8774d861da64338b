"""The book's Markdown as HTML for pages that Sphinx does not make."""

import html
import re

from markdown_it import MarkdownIt
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin


def _math(content: str, options: dict[str, bool]) -> str:
    content = html.escape(content.strip(), quote=False)
    return rf"\[{content}\]" if options["display_mode"] else rf"\({content}\)"


# MathJax, in a deck as on a learning platform, looks for \( … \) and \[ … \].
PARSER = MarkdownIt("commonmark").enable("table")
PARSER.use(dollarmath_plugin, renderer=_math).use(amsmath_plugin)
MACROS = {r"\R": r"\mathbb{R}"}  # as in _config.yml
LABEL = re.compile(r"^\$\$ *\([\w-]+\)$", re.M)  # of a numbered equation
CITATION = re.compile(r"\s*\{cite[\w:]*\}`[^`]*`")
ROLE = re.compile(r"\{[\w:-]+\}`([^`]*)`")
TITLED = re.compile(r"(.*?)\s*<[^<>]*>", re.S)


def to_html(text: str) -> str:
    """HTML of MyST text whose formulas MathJax will set."""
    return str(PARSER.render(plain_roles(text))).strip()


def inline_html(text: str) -> str:
    """The same for text of one paragraph, without the paragraph around it."""
    return str(PARSER.renderInline(plain_roles(text))).strip()


def spelled_out(text: str) -> str:
    """The book's own macros written out, for a platform that does not know them."""
    for short, long in MACROS.items():
        text = re.sub(
            re.escape(short) + r"(?![A-Za-z])", long.replace("\\", r"\\"), text
        )
    return text


def plain_roles(text: str) -> str:
    """`{math}` becomes dollars, other roles words; citations and labels vanish."""

    def words(match: re.Match[str]) -> str:
        role, content = match[0].split("`")[0], match[1]
        if role == "{math}":
            return f"${content}$"
        titled = TITLED.fullmatch(content)
        if titled:
            return titled[1]
        if content.startswith("thm-"):
            return "the theorem"
        if content.startswith("fig-"):
            return "the figure"
        return content.rsplit("/", 1)[-1]

    return ROLE.sub(words, CITATION.sub("", LABEL.sub("$$", text)))
