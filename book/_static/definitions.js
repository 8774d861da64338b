// A word of the glossary shows its definition under the pointer, in the focus, and at
// the first tap; the second tap follows the link. Escape closes it.
let shown = null;
let leaving = 0;

function closeDefinition() {
  clearTimeout(leaving);
  if (shown) shown.style.display = "";
  shown = null;
}

function showDefinition(link, box) {
  closeDefinition();
  shown = box;
  box.style.display = "block";
  box.style.left = box.style.top = "0";
  const edge = 8;
  const word = link.getClientRects()[0]; // of a word in two lines, the first part
  const zero = box.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = Math.max(edge, Math.min(word.left, width - zero.width - edge));
  // Below the word; above it where there is no room below.
  const below = link.getBoundingClientRect().bottom;
  const fits = below + zero.height < innerHeight || word.top < zero.height;
  box.style.left = `${left - zero.left}px`;
  box.style.top = `${(fits ? below : word.top - zero.height) - zero.top}px`;
}

for (const link of document.querySelectorAll('article a[href*="glossary.html#term-"]')) {
  const box = document.getElementById(`definition-${link.hash.slice(1)}`);
  link.setAttribute("aria-describedby", box.id);
  const stay = () => clearTimeout(leaving);
  // Time to move the pointer from the word onto the definition.
  const leave = () => { stay(); leaving = setTimeout(closeDefinition, 200); };
  link.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") showDefinition(link, box);
  });
  link.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") leave();
  });
  box.addEventListener("pointerenter", stay);
  box.addEventListener("pointerleave", leave);
  link.addEventListener("focus", () => {
    if (link.matches(":focus-visible")) showDefinition(link, box);
  });
  link.addEventListener("blur", closeDefinition);
  link.addEventListener("click", (event) => {
    if (event.pointerType !== "touch" || shown === box) return;
    event.preventDefault();
    showDefinition(link, box);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeDefinition();
});
document.addEventListener("pointerdown", (event) => {
  if (shown && !shown.contains(event.target) && !event.target.closest?.(".std-term, [aria-describedby]")) closeDefinition();
});
