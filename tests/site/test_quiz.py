"""A quiz by keyboard alone: Tab from answer to answer, Enter or Space to open one."""

import pytest
from built_site import DESKTOP, PHONE, needs_browser

QUIZ = "book/course/quiz-01.html"
# Where the focus is, and how much of its answer hides below or under the score.
FOCUS = """() => {
  const at = document.activeElement, answer = at.closest('ol.quiz details');
  if (!answer || !at.matches('summary')) return null;
  const edge = document.querySelector('.quiz-score').getBoundingClientRect().top;
  return {
    open: answer.open,
    right: answer.dataset.right === 'true',
    hidden: answer.getBoundingClientRect().bottom - edge,
    outline: parseFloat(getComputedStyle(at).outlineWidth),
  };
}"""


@needs_browser
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_answer_is_reached_opened_and_read_by_keyboard(address, page, size):
    page.set_viewport_size(size)
    page.goto(address + QUIZ, wait_until="load")
    page.wait_for_selector("ol.quiz mjx-container", state="attached", timeout=15_000)
    page.wait_for_function("!document.querySelector('ol.quiz mjx-container[tabindex]')")
    answers, questions = (
        page.locator(f"ol.quiz {part}").count() for part in ("details", "> li")
    )
    page.locator("ol.quiz summary").first.focus()
    for number in range(answers):
        before = page.evaluate(FOCUS)
        assert before, f"Tab {number} does not lead to the next answer"
        assert not before["open"] and before["outline"] >= 2
        page.keyboard.press("Enter" if number % 2 else "Space")
        page.wait_for_function("document.activeElement.parentElement.open")
        page.wait_for_timeout(30)  # the fold's event comes after it has opened
        after = page.evaluate(FOCUS)
        assert after["hidden"] <= 0, f"answer {number + 1} is not all in sight"
        page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) is None  # and on, out of the quiz
    score = page.locator(".quiz-score[role=status]").inner_text()  # read out
    firsts = page.locator("ol.quiz li[data-first='true']").count()
    assert score.startswith(f"{firsts} right at the first try, of {questions} answered")
