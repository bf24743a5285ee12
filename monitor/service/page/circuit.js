// The induction circuit of one step: heads by layer, from the embedding up to the logits, and no more
// said of it than its claim.

import { h, svg, table } from "./dom.js";
import { number, spoken, whole, within } from "./words.js";

// As the picture that `phasewatch circuit` draws has it.
const TITLES = {
  "induction circuit": "Induction circuit: ablating its induction heads hurts more than any random group",
  attribution: "Heads that attend and write as in an induction circuit; no cause is shown",
  pattern: "Heads that attend as in an induction circuit: a pattern only",
  none: "Heads that attend as induction heads, with no path from a previous-token head",
};
const BEYOND = { k: 3, logits: 2 };
const MOST_DEVIATIONS = 20;
const ROW = 92;
const WIDTH = 640;

/** The rows of an answer, each an object. */
function rowsOf(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_value, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

function edgeOf(row) {
  const source = `${row.source_layer}.${row.source_head}`;
  const target = row.kind === "logits" ? "logits" : `${row.target_layer}.${row.target_head}`;
  const edge = { source, target, kind: row.kind, layer: row.source_layer, targetLayer: row.target_layer };
  if (row.kind === "k") {
    const deviations = row.key_composition_null_sd
      ? (row.key_composition - row.key_composition_null) / row.key_composition_null_sd : null;
    const known = row.key_composition !== null && deviations !== null;
    return { ...edge, known, deviations, share: known ? deviations / MOST_DEVIATIONS : 0,
      text: known ? `${number(row.key_composition)} (${deviations >= 0 ? "+" : ""}${deviations.toFixed(0)} sd)` : "not measured",
      null: `${number(row.key_composition_null)} ± ${number(row.key_composition_null_sd)} sd` };
  }
  const known = row.contrast !== null && row.contrast !== undefined;
  const deviations = known && row.contrast_stderr ? (row.contrast - (row.contrast_null ?? 0)) / row.contrast_stderr : null;
  return { ...edge, known: known && deviations !== null, deviations, strength: row.contrast,
    text: known ? within(row.contrast, row.contrast_stderr) : "not measured", null: number(row.contrast_null) };
}

/**
 * The graph of the rows of `circuit` at a step, or in words that there is none.
 * @param {{step: number, columns: Object}} told
 * @param {(head: string) => void} opened
 */
export function graph(told, opened) {
  const rows = rowsOf(told.columns);
  const edges = rows.filter((row) => row.kind === "k" || row.kind === "logits").map(edgeOf);
  if (edges.length === 0) {
    const why = [...new Set(rows.map((row) => row.validity))].join("; ");
    return h("p", { class: "nothing" }, `No circuit at step ${whole(told.step)}: ${why || "no edges"}.`);
  }
  const largest = Math.max(...edges.filter((e) => e.kind === "logits" && e.known).map((e) => e.strength), 1e-9);
  for (const edge of edges) {
    if (edge.kind === "logits" && edge.known) edge.share = edge.strength / largest;
    edge.beyond = edge.known && edge.deviations > BEYOND[edge.kind];
  }
  const { claim, causal_test: test } = rows[0];
  const words = [`Ablating the group of induction heads: ${spoken(String(test ?? "not made"))}.`,
    "Between heads: K-composition, beside random matrices. To the logits: what a head adds to the correct next",
    "token beyond a shuffled target's, ± 95%. Solid: beyond chance; dashed: not; dotted: not measured."].join(" ");
  return h("div", null, h("p", { class: "claim" }, TITLES[claim] ?? "No claim is made of this graph"),
    h("div", { class: "scrolled", tabindex: "0", role: "group", "aria-label": "Circuit" },
      drawn(edges, TITLES[claim] ?? "circuit", opened)),
    h("p", { class: "about" }, words),
    table("Edges of the circuit", [["From", (e) => e.source], ["To", (e) => e.target],
      ["What", (e) => (e.kind === "k" ? "K-composition" : "direct to the logits")],
      ["Strength", (e) => e.text], ["Null", (e) => e.null],
      ["Beyond chance", (e) => (e.known ? (e.beyond ? "yes" : "no") : "not measured")]], edges));
}

function drawn(edges, title, opened) {
  const heads = [...new Set(edges.flatMap((e) => [e.source, e.target]))].filter((name) => name !== "logits");
  const layers = [...new Set(heads.map((name) => Number(name.split(".")[0])))].sort((a, b) => a - b);
  const height = ROW * (layers.length + 1) + 40;
  const places = new Map([["logits", [WIDTH / 2, 24]]]);
  // Every head has a column of its own, so that no line to the logits passes through another.
  const ordered = [...heads].sort((a, b) => Number(a) - Number(b));
  ordered.forEach((name, at) => places.set(name, [70 + (WIDTH - 100) * ((at + 0.5) / ordered.length),
    height - 36 - ROW * (layers.indexOf(Number(name.split(".")[0])) + 0.6)]));
  const writes = new Set(edges.filter((e) => e.kind === "logits").map((e) => e.source));
  const line = (edge) => {
    const [[x, y], to] = [places.get(edge.source), places.get(edge.target)];
    const [tx, ty] = edge.target === "logits" ? [x, 38] : to;
    const along = edge.kind === "k" ? 0.6 : 0.5;
    return [svg("line", { x1: x, y1: y, x2: tx, y2: ty, class: `edge ${edge.kind} ${edge.beyond ? "beyond" : "chance"}`,
      "stroke-width": 1.5 + 5 * Math.min(1, Math.max(0, edge.beyond ? edge.share : 0)),
      "stroke-dasharray": edge.known ? (edge.beyond ? null : "7 4") : "2 4" }),
    svg("text", { x: x + along * (tx - x) + 10, y: y + along * (ty - y) + (edge.kind === "k" ? 16 : 0), class: "strength" }, edge.text)];
  };
  const foot = (name) => svg("line", { x1: places.get(name)[0], y1: height - 24, x2: places.get(name)[0],
    y2: places.get(name)[1], class: "stem" });
  const node = (name) => {
    const [x, y] = places.get(name);
    const kind = writes.has(name) ? "induction" : "previous-token";
    return svg("g", { class: `node ${kind}`, role: "button", tabindex: "0", "aria-label": `Open ${kind} head ${name}`,
      onclick: () => opened(name), onkeydown: (event) => { if (event.key === "Enter") opened(name); } },
    kind === "induction" ? svg("circle", { cx: x, cy: y, r: 19 }) : svg("rect", { x: x - 18, y: y - 16, width: 36, height: 32, rx: 3 }),
    svg("text", { x, y: y + 4 }, name), svg("text", { x: x + 24, y: y + 18, class: "kind" }, kind));
  };
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "circuit", role: "group", "aria-label": title },
    layers.map((layer, at) => svg("text", { x: 4, y: height - 32 - ROW * (at + 0.6), class: "layer" }, `layer ${layer}`)),
    ordered.map(foot),
    svg("rect", { x: 60, y: 10, width: WIDTH - 80, height: 28, rx: 4, class: "bar-end" }),
    svg("text", { x: WIDTH / 2 + 20, y: 28, class: "end" }, "logits of the next token"),
    svg("rect", { x: 60, y: height - 26, width: WIDTH - 80, height: 22, rx: 4, class: "bar-end" }),
    svg("text", { x: WIDTH / 2 + 20, y: height - 11, class: "end" }, "embedding"),
    edges.map(line), ordered.map(node));
}
