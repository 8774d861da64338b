"""Quizzes in the page, bands of scores, and the files of the course that a page offers.

    ```{quiz} 02
    ```

    {course-file}`Moodle XML <quiz-02.xml>`

    ```{course-bands}
    ```

    ```{course-bands} levels
    ```

The files are made when the site is: `_static/course/` holds them.
"""

import html
import sys
import zipfile
from pathlib import Path
from string import ascii_uppercase

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective, SphinxRole

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from book.course import (  # noqa: E402
    assign,
    bands,
    chapter,
    handouts,
    moodle,
    quiz,
    slides,
)

STATIC = ROOT / "book" / "course" / "static"


class QuizDirective(SphinxDirective):
    required_arguments = 1  # the chapter's two digits

    def run(self) -> list[nodes.Node]:
        (number,) = self.arguments
        questions = quiz.load(number)
        self.env.note_dependency(str(quiz.FOLDER / f"{number}.yaml"))
        self.env.note_dependency(str(chapter.published(number).path))
        made: list[nodes.Node] = [raw(f'<ol class="quiz" data-quiz="{number}">')]
        for question in questions.questions:
            made += self.question(number, question)
        return [*made, raw("</ol>")]

    def question(self, number: str, question: quiz.Question) -> list[nodes.Node]:
        name = f"quiz-{number}-{question.key}"
        made = [
            raw(f'<li id="{name}"><div role="group" aria-labelledby="{name}-ask">'),
            raw(f'<div class="quiz-ask" id="{name}-ask">'),
            *self.parse(question.ask),
            raw("</div>"),
        ]
        # A letter: to speak of an answer, and a name for one that is a formula alone.
        for letter, choice in zip(ascii_uppercase, question.choices, strict=False):
            verdict = "Right." if choice.right else "No."
            made += [
                raw(f'<details data-right="{str(choice.right).lower()}"><summary>'),
                raw(f"<b>{letter}.</b> "),
                nodes.inline("", "", *self.words(choice.text)),
                raw('</summary><div class="quiz-why">'),
                *self.parse(f"**{verdict}** {choice.why}"),
                raw("</div></details>"),
            ]
        section = html.escape(chapter.published(number).section(question.about))
        again = f'<p class="quiz-section">Section: {section}</p></div></li>'
        return [*made, raw(again)]

    def parse(self, text: str) -> list[nodes.Node]:
        holder = nodes.container()
        content = type(self.content)(text.splitlines(), "quiz")
        self.state.nested_parse(content, self.content_offset, holder)
        return list(holder.children)

    def words(self, text: str) -> list[nodes.Node]:
        """The inline content of a text of one paragraph."""
        (paragraph,) = self.parse(text)
        return list(paragraph.children)


class BandsDirective(SphinxDirective):
    """What a student's score may be, or the project's levels, from the records."""

    optional_arguments = 1  # levels

    def run(self) -> list[nodes.Node]:
        made = bands.levels() if self.arguments == ["levels"] else bands.table()
        for band in bands.BANDS + bands.LEVELS:
            self.env.note_dependency(str(bands.RESULTS / f"{band.file}.jsonl"))
        holder = nodes.container()
        content = type(self.content)(made.splitlines(), "bands")
        self.state.nested_parse(content, self.content_offset, holder)
        return list(holder.children)


def raw(code: str) -> nodes.raw:
    return nodes.raw("", code, format="html")


class CourseFile(SphinxRole):
    """A link to a file that this extension makes: `words <name>`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        words, _, name = self.text.rstrip(">").rpartition(" <")
        if name not in files():
            raise ValueError(f"{name!r} is none of {sorted(files())}.")
        up = "../" * self.env.docname.count("/")
        link = f'<a href="{up}_static/course/{name}">{html.escape(words)}</a>'
        return [raw(link)], []


def files() -> set[str]:
    """Names of what `write_files` makes."""
    return (
        {f"quiz-{number}.xml" for number in quiz.chapters()}
        | {f"slides-{number}.html" for number in slides.chapters()}
        | {assign.published(name) for name in assign.names()}
        | {f"handout-{number}.html" for number in handouts.HANDOUTS}
        | {"slides.zip"}
    )


def write_files(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "course"
    target.mkdir(parents=True, exist_ok=True)
    for number in quiz.chapters():
        text = moodle.to_xml(quiz.load(number))
        (target / f"quiz-{number}.xml").write_text(text, encoding="utf-8")
    assign.write(target)
    handouts.write(target)
    slides.write(target)
    pack(target)


def pack(target: Path) -> None:
    """All decks and what they need, in one file to take along."""
    with zipfile.ZipFile(target / "slides.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        mathjax = sorted((target.parent / "mathjax").rglob("*.*"))
        for path in [*sorted(target.glob("*.html")), *mathjax]:
            packed.write(path, path.relative_to(target.parent))
        for name in ("reveal.js", "reveal.css", "notes.js", "deck.css", "handout.css"):
            packed.write(target / name, f"{target.name}/{name}")


def add_static(app: Sphinx, config: Config) -> None:
    config.html_static_path.append(str(STATIC))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("quiz", QuizDirective)
    app.add_directive("course-bands", BandsDirective)
    app.add_role("course-file", CourseFile())
    app.connect("config-inited", add_static)
    app.connect("build-finished", write_files)
    app.add_css_file("course.css")
    app.add_js_file("course.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
