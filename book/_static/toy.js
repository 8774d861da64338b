// A layer with two inputs and two outputs is replaced by one of rank 1, in three ways.
// The weight stretches the first axis by 1.5 and leaves the second: W = diag(1.5, 1).
// The data are a cloud: `strength` times as long as wide, its long axis turned by
// `angle` degrees from the first axis. All that counts of it is its second moment C.
"use strict";

const STRETCH = [1.5, 1];

// C = R diag(strength², 1) Rᵀ, as [c11, c12, c22].
function secondMoment(angle, strength) {
  const a = (angle * Math.PI) / 180;
  const [c, s, long] = [Math.cos(a), Math.sin(a), strength ** 2];
  return [long * c * c + s * s, (long - 1) * c * s, long * s * s + c * c];
}

// Eigenvalues of a symmetric 2×2 matrix, and the angle of the first eigenvector.
function eigen([p, q, r]) {
  const middle = (p + r) / 2;
  const radius = Math.hypot((p - r) / 2, q);
  return { large: middle + radius, least: middle - radius, turn: Math.atan2(2 * q, p - r) / 2 };
}

// ‖(W − Ŵ)X‖ / ‖WX‖ for the three rank-1 layers Ŵ, and the direction each listens to.
function toyErrors(angle, strength) {
  const [w1, w2] = STRETCH;
  const [c11, c12, c22] = secondMoment(angle, strength);
  const output = eigen([w1 * w1 * c11, w1 * w2 * c12, w2 * w2 * c22]); // of W C Wᵀ
  const whole = w1 * w1 * c11 + w2 * w2 * c22;
  // Input-PCA keeps x's part along C's first eigenvector; W (I − v vᵀ) X is left,
  // and (I − v vᵀ) C (I − v vᵀ) = λ₂ n nᵀ with n at right angles to v.
  const input = eigen([c11, c12, c22]);
  const [n1, n2] = [-Math.sin(input.turn), Math.cos(input.turn)];
  const lostByInput = Math.max(0, input.least) * ((w1 * n1) ** 2 + (w2 * n2) ** 2);
  return {
    svd: Math.sqrt((w2 * w2 * c22) / whole), // keeps the first axis alone
    input: Math.sqrt(lostByInput / whole),
    drone: Math.sqrt(Math.max(0, output.least) / whole),
    listens: {
      svd: 0,
      input: input.turn,
      // Ŵ = u uᵀ W listens to the direction of Wᵀ u
      drone: Math.atan2(w2 * Math.sin(output.turn), w1 * Math.cos(output.turn)),
    },
  };
}
window.toyErrors = toyErrors; // the tests compare it with NumPy

const METHODS = [
  ["svd", "SVD of the weight", "keeps what W stretches most"],
  ["input", "PCA of the inputs", "keeps where the inputs are"],
  ["drone", "DRONE", "keeps where the outputs are"],
];

function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent?.append(made);
  return made;
}

// A fixed cloud: points of a sunflower, whose second moment is that of a round cloud.
function cloud(count) {
  return Array.from({ length: count }, (_, i) => {
    const [radius, turn] = [Math.sqrt((i + 0.5) / count), i * 2.399963];
    return [radius * Math.cos(turn), radius * Math.sin(turn)];
  });
}

function build(place) {
  place.innerHTML = `
    <div class="toy-sliders">
      <label>Angle between the data and what W stretches: <output>60</output>°
        <input type="range" min="0" max="90" step="1" value="60"></label>
      <label>Strength, length of the cloud over its width: <output>4</output>
        <input type="range" min="1" max="8" step="0.1" value="4"></label>
    </div>
    <div class="toy-panels">
      <svg viewBox="-110 -110 220 220" role="img" aria-label="The inputs as a cloud of
        points, and the one direction that each of the three layers listens to"></svg>
      <table><caption>Error left at rank 1, in % of the output</caption><tbody></tbody></table>
    </div>`;
  const [angle, strength] = place.querySelectorAll("input");
  const said = place.querySelectorAll("output");
  const picture = place.querySelector("svg");
  svg("path", { d: "M-105 0H105M0-105V105", class: "toy-axis" }, picture);
  const dots = cloud(140).map((point) => ({ point, dot: svg("circle", { r: 1.6 }, picture) }));
  const lines = {};
  const rows = {};
  for (const [key, name, why] of METHODS) {
    lines[key] = svg("line", { class: `toy-line toy-${key}` }, picture);
    const row = place.querySelector("tbody").insertRow();
    row.innerHTML = `<th scope="row">${name}<small>${why}</small></th>
      <td><span class="toy-bar toy-${key}"></span></td><td class="toy-number"></td>`;
    rows[key] = row;
  }
  function draw() {
    const [degrees, long] = [Number(angle.value), Number(strength.value)];
    said[0].textContent = degrees;
    said[1].textContent = long.toFixed(1);
    angle.setAttribute("aria-valuetext", `${degrees} degrees`);
    strength.setAttribute("aria-valuetext", `${long.toFixed(1)} times`);
    const errors = toyErrors(degrees, long);
    const turn = (degrees * Math.PI) / 180;
    for (const { point, dot } of dots) {
      const [x, y] = [point[0] * 95, (point[1] * 95) / long];
      dot.setAttribute("cx", x * Math.cos(turn) - y * Math.sin(turn));
      dot.setAttribute("cy", -(x * Math.sin(turn) + y * Math.cos(turn)));
    }
    for (const [key] of METHODS) {
      const [x, y] = [105 * Math.cos(errors.listens[key]), -105 * Math.sin(errors.listens[key])];
      for (const [name, value] of Object.entries({ x1: -x, y1: -y, x2: x, y2: y })) {
        lines[key].setAttribute(name, value);
      }
      const percent = 100 * errors[key];
      rows[key].querySelector(".toy-bar").style.width = `${percent}%`;
      rows[key].querySelector(".toy-number").textContent = `${percent.toFixed(1)} %`;
    }
  }
  angle.addEventListener("input", draw);
  strength.addEventListener("input", draw);
  draw();
}

document.querySelectorAll(".drone-toy").forEach((place) => build(place));
