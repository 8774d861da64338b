"""Quizzes: what a question must have, where its numbers come from, the export."""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import xmlschema
import yaml

from book.course import chapter, moodle, quiz

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("moodle.xsd"))
GOOD = {
    "id": "sum",
    "about": "eq-cost",
    "ask": "How much is <<a>> and <<b>>?",
    "compute": "a, b = 2, 3\nright, product, less = a + b, a * b, a - b",
    "right": {"text": "<<right>>", "why": "Count."},
    "wrong": [
        {"text": "<<product>>", "why": "That is the product."},
        {"text": "<<less>>", "why": "That is the difference."},
    ],
}


@pytest.fixture(params=quiz.chapters())
def asked(request):
    return quiz.load(request.param)


def read(tmp_path, **changed):
    source = {"title": "A quiz", "questions": [GOOD | changed]}
    (tmp_path / "01.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
    return quiz.load("01", tmp_path).questions[0]


def test_numbers_are_computed(tmp_path):
    question = read(tmp_path)
    assert question.ask == "How much is 2 and 3?"
    assert {(c.text, c.right) for c in question.choices} == {
        ("5", True),
        ("6", False),
        ("-1", False),
    }


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"right": {"text": "5", "why": "Count."}}, "is typed"),
        ({"right": {"text": "1,536 %", "why": "Count."}}, "is typed"),
        ({"right": {"text": "<<sum>>", "why": "Count."}}, "sets no 'sum'"),
        ({"right": {"text": "<<product>>", "why": "Count."}}, "read the same"),
        ({"right": {"text": "<<right>>"}}, "a text and a why"),
        ({"wrong": GOOD["wrong"][:1]}, "at least two wrong"),
        ({"hint": "none"}, "unknown \\['hint'\\]"),
    ],
)
def test_a_faulty_question_is_refused(tmp_path, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path, **changed)


def test_a_chapter_has_six_to_ten_questions(asked):
    assert 6 <= len(asked.questions) <= 10


def test_each_question_has_one_right_answer_and_says_why_of_each(asked):
    for question in asked.questions:
        assert sum(choice.right for choice in question.choices) == 1, question.key
        for choice in question.choices:
            assert len(choice.why) > 20, question.key
            assert "<<" not in choice.text + choice.why + question.ask


def test_the_right_answer_has_no_place_of_its_own(asked):
    places = Counter(
        [choice.right for choice in question.choices].index(True)
        for question in asked.questions
    )
    assert max(places.values()) <= 5


def test_each_question_leads_to_a_section_of_its_chapter(asked):
    own = chapter.published(asked.chapter)
    for question in asked.questions:
        heading = own.section(question.about)
        assert re.match(rf"{int(asked.chapter)}\.\d |Exercises", heading), question.key


def test_a_label_the_chapter_does_not_have_is_noticed():
    with pytest.raises(LookupError, match="no cell or label 'eq-gone'"):
        chapter.published("01").section("eq-gone")


def test_the_export_follows_the_schema(asked):
    SCHEMA.validate(moodle.to_xml(asked))


def test_the_export_holds_every_answer_with_its_feedback(asked):
    root = ET.fromstring(moodle.to_xml(asked))
    questions = root.findall("question[@type='multichoice']")
    assert len(questions) == len(asked.questions)
    for element, question in zip(questions, asked.questions, strict=True):
        answers = element.findall("answer")
        assert [a.get("fraction") == "100" for a in answers] == [
            choice.right for choice in question.choices
        ]
        assert all(a.findtext("feedback/text") for a in answers)
        # a platform knows none of the book's macros and roles, nor dollars
        text = ET.tostring(element, encoding="unicode")
        assert not re.search(r"\\R\b|\$|\{\w+\}`", text), question.key


def test_a_wrong_export_is_noticed():
    text = moodle.to_xml(quiz.load("01")).replace("<feedback", "<feedbak")
    text = text.replace("</feedback", "</feedbak")
    assert not SCHEMA.is_valid(text)


def test_known_numbers_are_what_the_library_says():
    """The quiz computes by its own formula; here the library's word for it."""
    import drone

    answers = {
        question.key: next(c.text for c in question.choices if c.right)
        for number in ("01", "02")
        for question in quiz.load(number).questions
    }
    assert answers["break-even-square"] == str(drone.break_even_rank(768, 768))
    assert answers["second-moment-size"] == f"{768 * 769 // 2:,}"
