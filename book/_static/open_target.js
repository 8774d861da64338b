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
