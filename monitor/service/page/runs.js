// The list of runs.

import { answer } from "./data.js";
import { h, refill } from "./dom.js";
import { about, ago, whole } from "./words.js";

const SAYS = {
  running: "measured lately",
  finished: "closed after its last measurement",
  stalled: "no measurement for a while, and not closed",
};

/** The state of a run, by shape, colour and word. */
export function stateOf(info) {
  return h("span", { class: `state ${info.state}`, title: SAYS[info.state] ?? "" }, info.state);
}

export class RunList {
  /** @param {HTMLElement} holder @param {(runs: string[]) => void} open */
  constructor(holder, open) {
    this.holder = holder;
    this.open_ = open;
    this.chosen = new Set();
  }

  async open() {
    this.rows = h("tbody");
    this.over = h("button", { type: "button", disabled: true, onclick: () => this.open_([...this.chosen]) },
      "Lay the chosen runs over each other");
    this.body = h("div");
    refill(this.holder, h("h1", null, "Runs"), this.body);
    await this.update();
  }

  async update() {
    const infos = await answer("/api/runs");
    if (infos.length === 0) {
      refill(this.body, h("p", { class: "nothing card" }, "No runs yet. They appear here by themselves once "
        + "something is measured into this folder: TrainingDynamics(root=…), Monitor(root=…) or `phasewatch demo --root …`."));
      return;
    }
    const held = document.activeElement?.dataset?.run;
    const order = { running: 0, stalled: 1, finished: 2 };
    infos.sort((a, b) => order[a.state] - order[b.state] || (b.time ?? "").localeCompare(a.time ?? ""));
    refill(this.rows, infos.map((info) => this.#row(info)));
    if (!this.rows.isConnected) {
      refill(this.body, h("div", { class: "card" }, h("div", { class: "scrolled", tabindex: "0", role: "group", "aria-label": "Runs" },
        h("table", { class: "runs" }, h("caption", { class: "unseen" }, "Runs"), h("thead", null, h("tr", null,
          ["Run", "State", "Step", "Tokens", "Last measured", "Measurements", "Attempts", "Model", "Parameters", "Seed"]
            .map((name) => h("th", { scope: "col" }, name)))), this.rows)), h("p", null, this.over)));
    }
    if (held) this.rows.querySelector(`[data-run="${CSS.escape(held)}"]`)?.focus();
  }

  #row(info) {
    const box = h("input", { type: "checkbox", "aria-label": `Choose ${info.run}`, checked: this.chosen.has(info.run),
      "data-run": info.run, onchange: () => this.#choose(info.run, box.checked) });
    return h("tr", null, h("th", { scope: "row" }, box, " ",
      h("a", { href: `#/run?run=${encodeURIComponent(info.run)}` }, info.run)),
    [stateOf(info), whole(info.last_step), about(info.tokens), ago(info.time), whole(info.measurements),
      whole(info.attempts), info.model ?? "–", about(info.parameters), info.seed ?? "–"]
      .map((cell) => h("td", null, cell)));
  }

  #choose(run, there) {
    if (there) this.chosen.add(run);
    else this.chosen.delete(run);
    this.over.disabled = this.chosen.size < 2;
  }

  close() {}

  restyle() {}
}
