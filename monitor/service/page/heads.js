// The heads of one run at one step: the heat map with its slider, and what is known of a single head.

import { answer } from "./data.js";
import { choice, h, refill, refusal, say } from "./dom.js";
import { Figure } from "./figure.js";
import { HeatMap } from "./heatmap.js";
import { number, spoken, whole, within } from "./words.js";

const FRAME_MS = 350;
const EVIDENCE = ["label", "claim", "attribution_test", "causal_test", "ablated_with"];

/** The slider that chooses the step of all that is shown of one step. */
export class StepSlider {
  /** @param {(step: number|null) => void} moved null: the last one, also once there are more */
  constructor(moved) {
    this.moved = moved;
    this.steps = [];
    this.timer = null;
    this.input = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Step",
      oninput: () => this.#to(Number(this.input.value)) });
    this.output = h("output", null);
    this.playing = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.#play() }, "Play");
    this.latest = h("button", { type: "button", onclick: () => { this.#stop(); moved(null); } }, "Latest");
    this.element = h("div", { class: "slider" }, this.playing, this.input, this.output, this.latest);
  }

  /** @param {number[]} steps @param {number|null} step */
  show(steps, step) {
    this.steps = steps;
    const last = Math.max(0, steps.length - 1);
    const after = step === null ? -1 : steps.findLastIndex((known) => known <= step);
    this.input.max = last;
    this.input.value = step === null ? last : Math.max(0, after);
    const shown = steps[Number(this.input.value)];
    this.input.setAttribute("aria-valuetext", `step ${shown}`);
    this.output.textContent = shown === undefined ? "–" : `step ${whole(shown)}`;
    this.latest.setAttribute("aria-pressed", String(step === null));
  }

  #to(at) {
    // At the end it stays at the end while a run grows.
    this.moved(at >= this.steps.length - 1 ? null : this.steps[at]);
  }

  #play() {
    if (this.timer !== null) {
      this.#stop();
      return;
    }
    this.playing.setAttribute("aria-pressed", "true");
    this.playing.textContent = "Pause";
    let at = Number(this.input.value) >= this.steps.length - 1 ? -1 : Number(this.input.value);
    this.timer = setInterval(() => {
      at += 1;
      this.#to(at);
      if (at >= this.steps.length - 1) this.#stop();
    }, FRAME_MS);
  }

  #stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.playing.setAttribute("aria-pressed", "false");
    this.playing.textContent = "Play";
  }

  close() {
    this.#stop();
  }
}

export class Heads {
  /** @param {import("./run.js").RunPage} page @param {Figure} figure that of which the field is shown */
  constructor(page, figure) {
    this.page = page;
    this.figure = figure;
    this.beside = true;
    this.stepped = true;
    this.turn = 0;
    this.map = new HeatMap((layer, head) => page.openHead(`${layer}.${head}`));
    this.run = h("div", { class: "controls" });
    this.notes = h("div", { class: "notes" });
    this.title = h("h3", { id: "map-title" }, "Every head");
    this.caption = h("figcaption", null);
    this.element = h("figure", { class: "card", "aria-labelledby": "map-title", "data-figure": "map" },
      this.title, this.run, this.map.element, this.notes, this.caption);
  }

  async refresh() {
    const { page } = this;
    const { table, field } = this.figure.curves()[0];
    const turn = this.turn += 1;
    const run = page.one();
    if (page.place.run.length > 1) {
      refill(this.run, choice("Run", page.place.run, run, (value) => { page.choose("map.run", value); page.moved(); }));
    }
    let told;
    try {
      told = await answer("/api/rows", { run, table, field, step: page.place.step });
    } catch (error) {
      refill(this.notes, refusal(error));
      return;
    }
    if (turn !== this.turn) return;
    refill(this.notes);
    this.#show(told, field);
    const declared = page.declared(table, field);
    refill(this.title, `Every head: ${spoken(field)} at step ${whole(told.step)}`);
    refill(this.caption, h("p", null, declared.help, declared.null ? ` Null: ${declared.null}.` : "",
      " Colour: value above its null. Hatched: not interpretable."));
  }

  #show({ columns }, field) {
    const cells = new Map();
    let top = 0;
    columns.layer.forEach((layer, i) => {
      const cell = { value: columns[field][i], validity: columns.validity[i],
        stderr: columns[`${field}_stderr`]?.[i], null: columns[`${field}_null`]?.[i] };
      cells.set(`${layer}.${columns.head[i]}`, cell);
      if (cell.validity === "ok" && cell.value !== null) top = Math.max(top, cell.value - (cell.null ?? 0));
    });
    // The best of all steps, so that colours mean the same while the slider moves.
    for (const line of this.figure.lines) {
      line.value.forEach((value, i) => {
        if (value !== null) top = Math.max(top, value - (line.null?.[i] ?? 0));
      });
    }
    this.map.show(cells, Math.max(...columns.layer) + 1, Math.max(...columns.head) + 1, top || 1, spoken(field));
  }
}

/** All that is measured of one head, over time, and what is claimed of it. */
export class HeadPanel {
  constructor(page, curves) {
    this.page = page;
    this.curves = curves;
    this.stepped = true;
    this.figures = [];
    this.head = "";
    this.heading = h("h3", { tabindex: "-1", id: "head-title" });
    this.role = h("div", null);
    this.body = h("div", { class: "cards" });
    this.element = h("section", { class: "panel", hidden: true, "aria-labelledby": "head-title" },
      h("div", { class: "head" }, this.heading, h("button", { type: "button",
        onclick: () => page.openHead("") }, "Close")), this.role, this.body);
  }

  async refresh() {
    const { page } = this;
    const { head } = page.place;
    this.element.hidden = head === "";
    if (head !== this.head) {
      this.#clear();
      this.head = head;
      if (head === "") return;
      const [layer, number_] = head.split(".");
      refill(this.heading, `Head ${head}`);
      this.figures = this.curves.map((curve) => new Figure({ id: `head.${curve.table}.${curve.field}`,
        title: spoken(curve.field), small: true,
        curves: [{ ...curve, top: undefined, dims: { layer, head: number_ } }] }, page));
      refill(this.body, this.figures.map((figure) => figure.element));
      if (page.entered) this.heading.focus();
      say(`Head ${head} is open.`);
    }
    if (head === "") return;
    await Promise.all([this.#tellRole(head), ...this.figures.map((figure) => figure.refresh())]);
  }

  async #tellRole(head) {
    const { page } = this;
    const run = page.one();
    if (!page.has("heads")) {
      refill(this.role, h("p", { class: "nothing" }, "What it does is not said: the probe 'heads' was not measured."));
      return;
    }
    const told = await answer("/api/rows", { run, table: "heads", step: page.place.step }).catch((error) => error);
    if (told instanceof Error) {
      refill(this.role, refusal(told));
      return;
    }
    const { columns } = told;
    const i = columns.layer.findIndex((layer, at) => `${layer}.${columns.head[at]}` === head);
    const of = (name) => columns[name]?.[i] ?? "–";
    refill(this.role, i < 0 ? h("p", null, `There is no head ${head} at step ${told.step}.`) : h("dl", { class: "facts" },
      EVIDENCE.filter((name) => name in columns).map((name) => h("div", null, h("dt", null, spoken(name)),
        h("dd", null, spoken(String(of(name) || "–"))))),
      h("div", null, h("dt", null, "excess"), h("dd", null,
        columns.validity[i] === "ok" ? within(of("excess"), columns.excess_stderr?.[i]) : columns.validity[i])),
      h("div", null, h("dt", null, "at step"), h("dd", null, number(told.step)))));
  }

  restyle() {
    for (const figure of this.figures) figure.restyle();
  }

  #clear() {
    for (const figure of this.figures) figure.close();
    this.figures = [];
    refill(this.body);
    refill(this.role);
  }

  close() {
    this.#clear();
  }
}
