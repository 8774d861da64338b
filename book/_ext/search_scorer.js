// How high a page stands among what the search found. Sphinx's own numbers put each
// function of the library above the chapter that explains it.
const asked = (new URLSearchParams(location.search).get("q") ?? "").trim();
// A name as it stands in code asks for the library.
const asksForCode = /[_()]|[A-Za-z]\.[A-Za-z]|[a-z][A-Z]/.test(asked);
const chapterAsked = asked.match(/^[a-z]+\.?\s+(\d+)\.\d+$/i)?.[1].padStart(2, "0");
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, , , score]) => {
    if (page === "book/api") return asksForCode ? score + 100 : score - 100;
    if (title.toLowerCase().includes(asked.toLowerCase())) score += 30;
    if (page.startsWith(`book/chapters/${chapterAsked}-`)) score += 30;
    if (page === "book/ledger") score += 5;
    return score;
  },
};
