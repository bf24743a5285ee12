// What was said of changes: bands in every chart, a list with intervals, and which came before which.

import { h, svg, table } from "./dom.js";
import { whole } from "./words.js";

/**
 * @typedef {Object} Transition
 * @property {string} name its number in the list, as in the charts
 * @property {string} run
 * @property {string} series
 * @property {string} kind
 * @property {"provisional"|"confirmed"|"retracted"} state what was said last
 * @property {number} from @property {number} at @property {number} to steps
 * @property {number|null} low @property {number|null} high of the midpoint, 95%
 * @property {Object} row what was said last
 * @property {Array<{state: string, step: number}>} said
 */

/** The transitions of all runs, each from all that was said of it. @returns {Transition[]} */
export function gathered(rows) {
  const of = new Map();
  for (const row of rows) {
    const key = `${row.run}\n${row.series}\n${row.detected_at}`;
    of.set(key, [...(of.get(key) ?? []), row]);
  }
  const found = [...of.values()].map((said) => {
    const row = said.at(-1);
    const at = row.midpoint ?? row.began ?? row.detected_at;
    // Of a change that is not fitted, or not over, as far as it was seen.
    const change = row.kind === "change";
    return { run: row.run, series: row.series, kind: row.kind, state: row.state, row, at,
      from: row.onset ?? (change ? Math.min(at, row.detected_at) : at),
      to: row.end ?? (change ? row.step : at),
      low: row.midpoint_low ?? null, high: row.midpoint_high ?? null,
      said: said.map(({ state, step }) => ({ state, step })) };
  });
  found.sort((a, b) => a.at - b.at);
  return found.map((one, at) => ({ ...one, name: String(at + 1) }));
}

const KINDS = { change: "changes", formation: "forms", break: "breaks" };

/** An interval, or the number alone where there is none. */
function between(value, low, high) {
  if (value === null || value === undefined) return "no fit yet";
  return low === null || low === undefined ? whole(value)
    : `${whole(value)} (${whole(low)} to ${whole(high)})`;
}

/**
 * The list of transitions. `jump` is called with the one that was chosen.
 * @param {Transition[]} transitions
 */
export function list(transitions, several, jump) {
  if (transitions.length === 0) {
    return h("p", { class: "nothing" }, "Nothing was said of any change yet. Changes, formations and breaks "
      + "are said while a run is measured, in the table 'transitions'; `phasewatch transitions --fit` fits "
      + "whole runs afterwards.");
  }
  const last = Math.max(...transitions.flatMap((one) => [one.to, one.high ?? 0, one.row.step]));
  return h("div", null, table("Transitions", [
    ["No.", (one) => h("button", { type: "button", "data-transition": one.name,
      "aria-label": `Go to transition ${one.name}, ${one.series}`, onclick: () => jump(one) }, one.name)],
    ...(several ? [["Run", (one) => one.run]] : []),
    ["Series", (one) => one.series],
    ["What", (one) => `${KINDS[one.kind] ?? one.kind}, ${one.row.direction ?? ""}`],
    ["State", (one) => h("span", { class: `state ${one.state}` }, one.state)],
    ["Midpoint, 95%", (one) => (one.kind === "change" ? between(one.row.midpoint, one.low, one.high)
      : `at ${whole(one.at)}`)],
    ["Onset to end", (one) => ((one.row.onset ?? null) === null ? "–"
      : `${whole(one.row.onset)} to ${(one.row.end ?? null) === null ? "not over yet" : whole(one.row.end)}`)],
    ["Where", (one) => lane(one, last)],
    ["Said", (one) => one.said.map(({ state, step }) => `${state} at ${whole(step)}`).join(", ")],
    ["Beside", (one) => one.row.label || "–"],
  ], transitions), h("p", { class: "about" }, "In the charts: a line at the midpoint, solid where confirmed, dashed "
    + "where provisional, dotted where retracted; shaded from onset to end, as fitted to what was measured until it was "
    + "said, or as far as it was seen where there is no fit; darker within the 95% interval of the midpoint. "
    + "What forms has a line where it was first seen. Formations and changes are found as they happen, without hindsight."));
}

function lane(one, last) {
  const x = (step) => 160 * (step / (last || 1));
  const band = (low, high, className) => svg("rect", { x: x(low), y: 2, height: 10, class: className,
    width: Math.max(2, x(high) - x(low)) });
  return svg("svg", { width: 164, height: 14, class: `lane ${one.state}`, role: "img",
    "aria-label": `steps ${whole(one.from)} to ${whole(one.to)} of ${whole(last)}` },
  svg("line", { x1: 0, x2: 160, y1: 7, y2: 7, class: "track" }), band(one.from, one.to, "span"),
  one.low === null ? null : band(one.low, one.high, "interval"), band(one.at, one.at, "point"));
}

/**
 * What came before what, by how much: in each run, and over the runs.
 * @param {Object} told the answer of /api/leads
 */
export function leads(told, several) {
  const { within, over, meaning, runs } = told;
  const failed = runs.filter((run) => run.error);
  const waiting = runs.filter((run) => !run.ready && !run.error).map((run) => run.run);
  const kinds = { formation: "formed", fit: "fitted" };
  const steps = (low, high) => `${whole(low)} to ${whole(high)}`;
  const inRuns = table("Leads within a run", [
    ["First", (row) => row.first], ["Then", (row) => row.then],
    ...(several ? [["Run", (row) => row.run]] : []),
    ["How known", (row) => kinds[row.kind] ?? row.kind], [told.axis === "step" ? "Lead, steps" : "Lead, tokens", (row) => whole(row.lead)],
    ["Interval", (row) => steps(row.lead_low, row.lead_high)],
    ["Which was first", (row) => (row.sure ? "sure" : "not told apart")]], within);
  const overRuns = table("Leads over the runs", [
    ["First", (row) => row.first], ["Then", (row) => row.then], ["How known", (row) => kinds[row.kind] ?? row.kind],
    ["Runs", (row) => whole(row.runs)], ["Before", (row) => whole(row.before)], ["After", (row) => whole(row.after)],
    ["Not told apart", (row) => whole(row.unclear)], ["Median", (row) => whole(row.median)],
    ["Least to most", (row) => steps(row.least, row.most)]], over);
  return h("div", null,
    waiting.length ? h("p", { class: "nothing" }, `Being worked out: ${waiting.join(", ")}.`) : null,
    failed.map((run) => h("p", { class: "wrong" }, `${run.run}: ${run.error}`)),
    within.length ? inRuns : waiting.length ? null : h("p", { class: "nothing" },
      "No lead yet: one is told where two things formed in a run, or two transitions can be fitted."),
    several && over.length ? [h("h3", null, "Over the runs"), overRuns] : null,
    within.length ? h("div", { class: "about" }, [...new Set(within.map((row) => row.kind))].map((kind) =>
      h("p", null, h("b", null, `${kinds[kind] ?? kind}: `), meaning[kind] ?? ""))) : null);
}
