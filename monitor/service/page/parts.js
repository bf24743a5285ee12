// What a section has besides its charts. A part is an element that can be brought up to date; `stepped`:
// it is of the step that is chosen; `always`: it costs nothing, and is kept current out of sight too.

import { graph } from "./circuit.js";
import { answer } from "./data.js";
import { h, refill, refusal } from "./dom.js";
import { HeadPanel, Heads } from "./heads.js";
import { topNeurons } from "./neurons.js";
import { leads, list } from "./transitions.js";

const AGAIN_MS = 3_000;

/** @param {string} id of the section @param {import("./run.js").RunPage} page @param {Object[]} figures */
export function moreOf(id, page, figures) {
  if (id === "heads" && figures.length) {
    const heads = new Heads(page, figures[0]);
    figures[0].sketch.chosen = () => heads.refresh();
    return [heads, new HeadPanel(page, page.curves)];
  }
  if (id === "circuit" && page.has("circuit")) {
    return [ofRows("circuit", page, (told) => graph(told, (head) => page.openHead(head)))];
  }
  if (id === "neurons" && page.has("top_neurons")) return [ofRows("top_neurons", page, topNeurons)];
  if (id === "transitions") return [transitionsOf(page)];
  return id === "leads" ? [leadsOf(page)] : [];
}

/** What is made of the rows of a table at one step. */
function ofRows(table, page, made) {
  const element = h("div", { class: "card", "data-table": table });
  return { element, stepped: true, refresh: () => told(element, async () =>
    made(await answer("/api/rows", { run: page.one(), table, step: page.place.step }))) };
}

function transitionsOf(page) {
  const element = h("div", { class: "card", id: "transition-list" });
  return { element, always: true, refresh: async () =>
    refill(element, list(page.transitions, page.place.run.length > 1, (one) => page.goto(one))) };
}

function leadsOf(page) {
  const element = h("div", { class: "card", id: "lead-list" });
  const refresh = () => told(element, async () => {
    const { run, axis } = page.place;
    // On the clock there are no leads: training may pause.
    const known = await answer("/api/leads", { run, axis: axis === "time" ? "step" : axis });
    if (!known.ready) setTimeout(() => element.isConnected && refresh(), AGAIN_MS);
    return leads(known, run.length > 1);
  });
  return { element, refresh };
}

/** Shows what is made, or why there is nothing. */
async function told(element, make) {
  try {
    refill(element, await make());
  } catch (error) {
    refill(element, refusal(error));
  }
}
