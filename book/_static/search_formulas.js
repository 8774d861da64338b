// Under a result the search shows a piece of the page's text, and a formula is still TeX
// there: say it in letters that read without being set.
const LETTERS = {
  times: "×", cdot: "·", top: "ᵀ", le: "≤", ge: "≥", in: "∈", to: "→", approx: "≈", dots: "…", vdots: "…",
  lVert: "‖", rVert: "‖", lvert: "|", rvert: "|", mid: "|", sum: "Σ", prod: "∏", partial: "∂", infty: "∞",
  ell: "ℓ", R: "ℝ", alpha: "α", beta: "β", delta: "δ", Delta: "Δ", varepsilon: "ε", eta: "η", lambda: "λ",
  Lambda: "Λ", mu: "μ", xi: "ξ", sigma: "σ", Sigma: "Σ", Omega: "Ω", sqrt: "√", leftarrow: "←",
  Longleftrightarrow: "⇔", qquad: " ", quad: " ", min: "min ", max: "max ", ln: "ln ", log: "log ", exp: "exp ",
};
const ABOVE = { hat: "\u0302", tilde: "\u0303", bar: "\u0304", overline: "\u0304" };
function readable(tex) {
  return tex
    .replace(/\\(?:begin|end)\{[^}]*\}|\\[()[\]]|\\[Bb]ig+[lr]?|\\(?:left|right)(?![a-z])|&|\\\\/g, " ")
    .replace(/\\(hat|tilde|bar|overline)\s*\{?(\w)\}?/g, (_, mark, letter) => letter + ABOVE[mark])
    .replace(/\\[td]?frac\{([^{}]*)\}\{([^{}]*)\}/g, "($1)/($2)")
    .replace(/\\([A-Za-z]+) ?/g, (_, name) => LETTERS[name] ?? "")
    .replace(/\\(.)/g, "$1")
    .replace(/[{}]/g, "")
    .replace(/\s+/g, " ")
    .trim();
}
const textOf = Search.htmlToText;
Search.htmlToText = (html, anchor) => {
  const page = new DOMParser().parseFromString(html, "text/html");
  page.querySelectorAll(".math").forEach((formula) => (formula.textContent = readable(formula.textContent)));
  return textOf(page.documentElement.outerHTML, anchor);
};
