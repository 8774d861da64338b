// Two figures from the book's records: one layer of MiniLM at any rank, and what a
// rank costs in a matrix of any size. All numbers shown are recorded or counted here.
"use strict";

const KEPT = (name) => {
  const data = document.querySelector(`.${name}-data`);
  return data ? JSON.parse(data.textContent) : [];
};
const whole = (number) => number.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;

// The largest rank at which two thin matrices need fewer multiplications than one.
function breakEven(m, n) {
  return Math.floor((m * n - 1) / (m + n));
}

// Parameters of two thin matrices, which are also the multiply-adds a token.
function cost(m, n, k) {
  return { dense: m * n, thin: k * (m + n), share: (k * (m + n)) / (m * n) };
}
window.rankCost = (m, n, k) => ({ ...cost(m, n, k), breakEven: breakEven(m, n) });

function options(select, values) {
  for (const [value, text] of values) select.add(new Option(text, value));
}

function costWords(m, n, k) {
  const { dense, thin, share } = cost(m, n, k);
  return `${whole(thin)} parameters, and as many multiply-adds a token: ${percent(share)}
    of the dense layer's ${whole(dense)}. Break-even is rank ${breakEven(m, n)}.`;
}

function buildFigure(place) {
  const layers = KEPT("rank-figure");
  place.innerHTML = `
    <div class="toy-sliders">
      <label>Layer <select></select></label>
      <label>Matrix <select></select></label>
      <label>Rank: <output></output> <input type="range" min="0" step="1"></label>
    </div>
    <svg class="rank-plot" viewBox="0 0 400 210" role="img"></svg>
    <table><caption>Output lost on fresh tokens, in %</caption><tbody>
      <tr><th scope="row">SVD</th><td><span class="toy-bar toy-svd"></span></td><td class="toy-number"></td></tr>
      <tr><th scope="row">DRONE</th><td><span class="toy-bar toy-drone"></span></td><td class="toy-number"></td></tr>
    </tbody></table>
    <p class="rank-cost" aria-live="polite"></p>`;
  const [layer, kind] = place.querySelectorAll("select");
  const slider = place.querySelector("input");
  const plot = place.querySelector("svg");
  const unique = (key) => [...new Set(layers.map((record) => record[key]))];
  options(layer, unique("layer").map((number) => [number, `${number} of ${unique("layer").length}`]));
  options(kind, unique("kind").map((name) => [name, name]));
  kind.value = "intermediate";
  function draw() {
    const record = layers.find((r) => r.layer === Number(layer.value) && r.kind === kind.value);
    const last = record.ranks.length - 1;
    slider.max = last;
    const at = Number(slider.value);
    const k = record.ranks[at];
    const [m, n] = [record.out, record.in];
    place.querySelector("output").textContent = k;
    slider.setAttribute("aria-valuetext", `rank ${k}`);
    place.querySelector(".rank-cost").textContent = `${m} × ${n}: ${costWords(m, n, k)}`;
    const x = (rank) => 40 + (350 * rank) / record.ranks[last];
    const y = (share) => 180 - 170 * share;
    const line = (name) => record.ranks.map((rank, i) => `${x(rank)},${y(record[name][i])}`).join(" ");
    const even = x(breakEven(m, n));
    const dot = (name) => `<circle class="toy-${name}" r="5" cx="${x(k)}" cy="${y(record[`lost_${name}`][at])}"/>`;
    plot.setAttribute("aria-label", `Output lost against rank: SVD ${percent(record.lost_svd[at])} and
      DRONE ${percent(record.lost_drone[at])} at rank ${k}`);
    plot.innerHTML = `<path class="rank-axis" d="M40 10V180H390"/>
      <text x="36" y="14" text-anchor="end">100</text><text x="36" y="184" text-anchor="end">0</text>
      <text x="390" y="198" text-anchor="end">rank ${record.ranks[last]}</text>
      <path class="rank-even" d="M${even} 10V180"/>
      <text x="${even - 5}" y="20" text-anchor="end">break-even ${breakEven(m, n)}</text>
      <polyline class="rank-spectrum" points="${line("spectrum")}"/>
      <polyline class="toy-line toy-svd" points="${line("lost_svd")}"/>
      <polyline class="toy-line toy-drone" points="${line("lost_drone")}"/>
      <path class="rank-here" d="M${x(k)} 10V180"/>${dot("svd")}${dot("drone")}`;
    place.querySelectorAll("tbody tr").forEach((row, i) => {
      const error = record[["lost_svd", "lost_drone"][i]][at];
      row.querySelector(".toy-bar").style.width = percent(error).replace(" ", "");
      row.querySelector(".toy-number").textContent = percent(error);
    });
  }
  slider.max = layers[0].ranks.length - 1;
  slider.value = Math.round(slider.max / 4);
  [layer, kind, slider].forEach((control) => control.addEventListener("input", draw));
  draw();
}

function buildCalculator(place) {
  const clocks = KEPT("break-even");
  place.innerHTML = `
    <div class="toy-sliders">
      <label>Outputs m <input type="number" min="1" value="3072"></label>
      <label>Inputs n <input type="number" min="1" value="768"></label>
      <label>Rank k <input type="number" min="1" value="304"></label>
    </div>
    <p class="rank-cost" aria-live="polite"></p><p class="rank-clock" aria-live="polite"></p>`;
  const numbers = [...place.querySelectorAll("input")];
  const [said, clock] = place.querySelectorAll("p");
  function draw() {
    const [m, n, k] = numbers.map((input) => Number(input.value));
    if (![m, n, k].every((number) => Number.isInteger(number) && number > 0)) {
      said.textContent = "Three whole numbers above zero are needed.";
      clock.textContent = "";
      return;
    }
    said.textContent = costWords(m, n, k);
    const same = clocks.filter((record) => record.out === m && record.in === n && record.rank > 0);
    if (!same.length) {
      const sizes = [...new Set(clocks.map((record) => `${record.out} × ${record.in}`))];
      clock.textContent = `No time is recorded for ${m} × ${n}; there is for ${sizes.join(" and ")}.`;
      return;
    }
    const ranks = [...new Set(same.map((record) => record.rank))];
    const near = ranks.reduce((a, b) => (Math.abs(b - k) < Math.abs(a - k) ? b : a));
    const times = same.filter((record) => record.rank === near).map((record) =>
      `${record.measured.toFixed(2)}× at ${record.tokens} token${record.tokens > 1 ? "s" : ""}`);
    clock.textContent = `Measured speed at rank ${near}, the nearest recorded:
      ${times.join(", ")} at once (${same[0].processor}).`;
  }
  numbers.forEach((input) => input.addEventListener("input", draw));
  draw();
}

document.querySelectorAll(".rank-figure").forEach(buildFigure);
document.querySelectorAll(".break-even").forEach(buildCalculator);
