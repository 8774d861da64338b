// Keep the score: a question counts if the first answer opened was the right one.
for (const quiz of document.querySelectorAll("ol.quiz")) {
  const questions = quiz.querySelectorAll(":scope > li");
  const score = document.createElement("p");
  score.className = "quiz-score";
  score.setAttribute("role", "status"); // read out when it changes
  quiz.after(score);
  const show = () => {
    const answered = quiz.querySelectorAll("li[data-first]").length;
    const right = quiz.querySelectorAll('li[data-first="true"]').length;
    score.textContent = answered
      ? `${right} right at the first try, of ${answered} answered and ${questions.length} asked.`
      : `${questions.length} questions. Open the answer you believe in.`;
  };
  for (const question of questions) {
    for (const choice of question.querySelectorAll("details")) {
      choice.addEventListener("toggle", () => {
        if (choice.open) question.dataset.first ??= choice.dataset.right;
        show();
        // What was opened by a key may lie below the screen's edge, or under the score.
        if (choice.open) choice.scrollIntoView({ block: "nearest" });
      });
    }
  }
  show();
}

// MathJax lets each formula take the focus; from answer to answer is to be one Tab.
window.addEventListener("load", () =>
  window.MathJax?.startup?.promise.then(() => {
    for (const formula of document.querySelectorAll("ol.quiz mjx-container")) {
      formula.removeAttribute("tabindex");
    }
  }),
);

// The sidebar's folds, which the theme leaves without a name.
for (const fold of document.querySelectorAll("nav details > summary")) {
  const link = fold.closest("li")?.querySelector("a");
  fold.setAttribute("aria-label", `pages below ${link?.textContent.trim() ?? "this"}`);
}
