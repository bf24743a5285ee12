// The neurons that tell concepts best, at one step.

import { h, table } from "./dom.js";
import { number, spoken, whole, within } from "./words.js";

const MOST = 24;

/** The rows of `top_neurons`, the best first. */
export function topNeurons({ step, columns }) {
  const rows = columns.layer.map((_layer, i) => Object.fromEntries(
    Object.keys(columns).map((name) => [name, columns[name][i]])));
  const best = (row) => (row.validity === "ok" ? row.auc ?? row.kurtosis ?? -Infinity : -Infinity);
  rows.sort((a, b) => best(b) - best(a));
  return h("div", null, h("h3", null, `Neurons that tell most, at step ${whole(step)}`), table("Neurons", [
    ["Neuron", (row) => `${row.layer}.${row.neuron}`],
    ["Shown to tell", (row) => spoken(row.label || "–")],
    ["Best concept", (row) => spoken(row.concept || "–")],
    ["AUC, 95%", (row) => (row.validity === "ok" ? within(row.auc, row.auc_stderr) : row.validity)],
    ["Null", (row) => number(row.auc_null)],
    ["Kurtosis", (row) => number(row.kurtosis)],
    ["Null", (row) => number(row.kurtosis_null)],
  ], rows.slice(0, MOST)), h("p", { class: "about" },
    "AUC is from sequences that did not choose the neuron; a concept of few token ids is told by neurons of untrained models too."));
}
