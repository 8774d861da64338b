"""What the search finds, in which order, and how it says formulas.

Sphinx lets a site bring its own score (search_scorer.js) and its own way to split a
text into words (Words, and search_words.js for what a reader types). The page itself
says formulas in letters, not in TeX: see search_formulas.js.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.search import languages
from sphinx.search.en import SearchEnglish

HERE = Path(__file__).parent


class Words(SearchEnglish):
    """English, in which 1.92 is one word; whole numbers alone nobody can search for."""

    _word_re = re.compile(r"\d+(?:\.\d+)+|\w+")
    js_splitter_code = (HERE / "search_words.js").read_text(encoding="utf-8")

    def word_filter(self, word: str) -> bool:
        return not word.isdecimal() and super().word_filter(word)


def add_script(app: Sphinx, page: str, *_: Any) -> None:
    if page == "search":
        # after Sphinx's own, whose function it wraps
        app.add_js_file("search_formulas.js", loading_method="defer")


def set_scorer(app: Sphinx, config: Config) -> None:
    # absolute, for Sphinx would look from the folder in which it was called
    config.html_search_scorer = str(HERE / "search_scorer.js")


def setup(app: Sphinx) -> dict[str, bool]:
    languages["en"] = Words
    app.connect("config-inited", set_scorer)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
