"""Number theorems, equations, figures and exercises by chapter: Theorem 2.1.

Sphinx counts through the whole book, so that the theorem of section 2.3 was Theorem 2.
"""

import re

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

CHAPTER = re.compile(r"book/chapters/(\d\d)-")


def number(app: Sphinx, env: BuildEnvironment) -> list[str]:
    for page, kinds in env.toc_fignumbers.items():
        chapter = CHAPTER.match(page)
        before = (int(chapter[1]),) if chapter else ()
        for numbers in kinds.values():
            for position, label in enumerate(numbers, start=1):
                numbers[label] = (*before, position)
    return []  # no page to read again


def setup(app: Sphinx) -> dict[str, bool]:
    # After Sphinx has counted (500), before anything is written.
    app.connect("env-get-updated", number, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
