"""A quiz as Moodle XML, which Moodle, ILIAS and OpenOlat import."""

import xml.etree.ElementTree as ET

from book.course import markup
from book.course.chapter import published
from book.course.quiz import Quiz


def to_xml(quiz: Quiz) -> str:
    """The quiz as one category of multiple-choice questions, with feedback."""
    root = ET.Element("quiz")
    category = ET.SubElement(root, "question", type="category")
    name = f"$course$/The DRONE Book/Chapter {int(quiz.chapter)}"
    _text(category, "category", name, None)
    for number, question in enumerate(quiz.questions, 1):
        element = ET.SubElement(root, "question", type="multichoice")
        _text(element, "name", f"{quiz.chapter}-{number:02} {question.key}", None)
        _text(element, "questiontext", _html(question.ask))
        section = published(quiz.chapter).section(question.about)
        _text(element, "generalfeedback", _html(f"Read again: {section}."))
        ET.SubElement(element, "defaultgrade").text = "1"
        ET.SubElement(element, "penalty").text = "0.3333333"
        ET.SubElement(element, "hidden").text = "0"
        ET.SubElement(element, "single").text = "true"
        ET.SubElement(element, "shuffleanswers").text = "true"
        ET.SubElement(element, "answernumbering").text = "abc"
        for choice in question.choices:
            answer = _text(element, "answer", _html(choice.text))
            answer.set("fraction", "100" if choice.right else "0")
            _text(answer, "feedback", _html(choice.why))
    ET.indent(root)
    text: str = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _html(text: str) -> str:
    return markup.to_html(markup.spelled_out(text))


def _text(
    parent: ET.Element, tag: str, content: str, format: str | None = "html"
) -> ET.Element:
    """An element that holds its words in a <text>, as Moodle wants it."""
    element = ET.SubElement(parent, tag, {"format": format} if format else {})
    ET.SubElement(element, "text").text = content
    return element
