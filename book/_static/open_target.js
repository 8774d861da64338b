// A link to a folded solution, or to a cell inside a fold, opens it.
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let box = target; box; box = box.parentElement) {
    if (box.matches("details")) box.open = true;
    if (box.matches(".toggle-hidden")) box.querySelector(".toggle-button").click();
  }
  target.querySelectorAll(":scope > details").forEach((fold) => (fold.open = true));
  target.scrollIntoView();
}
// The buttons that fold are made when the page is loaded; so wait for that.
window.addEventListener("load", () => setTimeout(openTarget));
window.addEventListener("hashchange", openTarget);
// A link in the title of a solution is followed; the title itself folds and unfolds.
for (const link of document.querySelectorAll(".admonition-title a")) {
  link.addEventListener("click", (event) => event.stopPropagation());
}
// On paper the solutions stand at the end of a chapter, as in its PDF.
let moved = []; // each solution, and the mark where it was
addEventListener("beforeprint", () => {
  const solutions = [...document.querySelectorAll("article .solution")];
  if (!solutions.length || document.querySelector("h2.solutions-at-end")) return;
  const heading = document.createElement("h2");
  heading.className = "solutions-at-end";
  heading.textContent = "Solutions";
  moved = solutions.map((solution) => [solution, document.createComment("solution")]);
  moved.forEach(([solution, mark]) => solution.replaceWith(mark));
  document.querySelector("article").append(heading, ...solutions);
});
addEventListener("afterprint", () => {
  if (!moved.length) return;
  moved.forEach(([solution, mark]) => mark.replaceWith(solution));
  moved = [];
  document.querySelector("h2.solutions-at-end").remove();
});
