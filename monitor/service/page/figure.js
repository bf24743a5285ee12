// A chart with all that belongs to it: what it is, its unit, its null and what can fool it; its legend,
// its numbers as a table and as CSV, and the choice of what is shown.

import { answer, live } from "./data.js";
import { choice, h, refill, refusal, say, svg, table, unique } from "./dom.js";
import { linesOf, nearest, reasons, rowsOf } from "./lines.js";
import { Plot } from "./plot.js";
import { csv, named, number, save, spoken, within } from "./words.js";

const POINTS = 1200;
const MOST_POINTS = 100_000;
const MOST_ROWS = 300;
const MOST_TOLD = 10;

/**
 * @typedef {Object} Curve one field of a table
 * @property {string} table
 * @property {string} field
 * @property {Object<string, string>} [dims] which rows of it
 * @property {number} [top] only the best so many series
 */

/**
 * @typedef {Object} Sketch what a figure is of
 * @property {string} id unique on the page, in the permalink
 * @property {string} title
 * @property {Curve[]} curves the choices where `choose`, else all are shown together
 * @property {boolean} [choose] whether one of the curves is chosen
 * @property {string[]} [filters] dimensions of which one value can be chosen
 * @property {boolean} [small]
 * @property {() => void} [chosen] called when another one is chosen
 */

export class Figure {
  /** @param {Sketch} sketch @param {import("./run.js").RunPage} page */
  constructor(sketch, page) {
    this.sketch = sketch;
    this.page = page;
    this.hovered = false;
    this.open = false;
    this.heard = 0;
    this.points = POINTS;
    const id = unique("figure");
    this.controls = h("div", { class: "controls" });
    this.holder = h("div", { class: "plot", role: "img", "aria-label": sketch.title,
      "aria-describedby": "plot-keys" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.legend = h("ul", { class: "legend", "aria-label": "Legend" });
    this.notes = h("div", { class: "notes" });
    this.caption = h("figcaption", null);
    this.numbers = h("div", null);
    this.asTable = h("button", { type: "button", "aria-expanded": "false",
      onclick: () => this.#toggleTable() }, "Table");
    this.reset = h("button", { type: "button", hidden: true, onclick: () => this.plot.zoomTo(null) },
      "Reset zoom");
    this.element = h("figure", { class: sketch.small ? "card small" : "card", "aria-labelledby": id,
      "data-figure": sketch.id },
    h("div", { class: "head" }, h("h3", { id }, sketch.title),
      h("div", { class: "tools" }, this.reset, this.asTable,
        h("button", { type: "button", onclick: () => this.#download() }, "CSV"))),
    this.controls, h("div", { class: "stage" }, this.holder, this.tip), this.legend, this.notes,
    this.caption, this.numbers);
    this.holder.addEventListener("mouseenter", () => { this.hovered = true; });
    this.holder.addEventListener("mouseleave", () => { this.hovered = false; this.tip.hidden = true; });
    this.holder.addEventListener("blur", () => { this.tip.hidden = true; });
    this.plot = new Plot(this.holder, {
      brief: sketch.small,
      picked: (x) => page.pick(x),
      pointed: (_plot, x) => this.#point(x),
      zoomed: (zoom) => this.#zoomed(zoom),
    });
    this.lines = [];
    if (sketch.choose) this.#offer();
  }

  close() {
    this.plot.close();
  }

  /** The curves that are to be seen, with the dimensions that the reader chose. */
  curves() {
    const { curves, choose, id, filters = [] } = this.sketch;
    const more = this.page.place.more;
    const wanted = more[`${id}.field`] ?? "";
    const chosen = choose ? [curves.find((c) => `${c.table}:${c.field}` === wanted) ?? curves[0]] : curves;
    const picked = (dim, usual) => more[`${id}.${dim}`] ?? usual ?? "all";
    return chosen.map((curve) => ({ ...curve, dims: Object.fromEntries([...Object.keys(curve.dims ?? {}), ...filters]
      .map((dim) => [dim, picked(dim, curve.dims?.[dim])]).filter(([, value]) => value !== "all")) }));
  }

  /** Asks anew and draws. */
  async refresh() {
    const { place } = this.page;
    const asked = this.curves();
    const turn = this.heard += 1;
    if (this.sketch.filters && this.page.has(asked[0].table)) {
      await this.page.learn(asked[0].table);
      this.#offer();
    }
    const answers = await Promise.allSettled(place.run.flatMap((run) => asked.map(async (curve) => ({
      run, curve, told: await answer("/api/series", { ...curve.dims, run, table: curve.table,
        field: curve.field, axis: place.axis, top: curve.top, points: this.points, format: "columns" }) }))));
    // An older question that was answered late is not shown over a newer one.
    if (turn !== this.heard) return;
    const there = answers.filter((one) => one.status === "fulfilled").map((one) => one.value);
    const refused = answers.filter((one) => one.status === "rejected").map((one) => one.reason);
    const all = there.flatMap(({ run, curve, told }) => told.series
      .map((series) => ({ run, field: curve.field, fields: asked.length, dims: curve.dims, series })));
    const found = all.filter(({ run, series }) => this.page.aligned(run) && series.value?.some((v) => v !== null));
    const hidden = new Set((place.more[`${this.sketch.id}.hidden`] ?? "").split("|"));
    this.lines = linesOf(found, this.page, hidden);
    this.#draw();
    this.#describe(asked);
    this.holder.parentElement.hidden = found.length === 0;
    if (found.length === 0) {
      refill(this.notes, refused.length ? refusal(refused[0]) : h("p", { class: "nothing" },
        `Nothing to see of ${spoken(asked[0].field)} yet.${await this.#why(asked[0])}`));
    } else {
      const lacking = place.run.filter((run) => !found.some((one) => one.run === run));
      refill(this.notes, lacking.length
        ? h("p", null, `Without it, or without the transition that is aligned: ${lacking.join(", ")}`) : null);
    }
  }

  /** Why rows cannot be interpreted where none of them can. */
  async #why({ table, field }) {
    const told = await answer("/api/rows", { run: this.page.place.run[0], table, field }).catch(() => null);
    const why = [...new Set(told?.columns.validity ?? [])].filter((word) => word !== "ok");
    return why.length ? ` Not interpretable: ${why.join("; ")}.` : "";
  }

  /** Draws what is known already: after a change of the marks, the step or the colours. */
  restyle() {
    if (this.plot.u !== null) this.plot.redraw(this.page.look());
  }

  #draw() {
    const { place } = this.page;
    const log = Math.min(...this.lines.flatMap((l) => l.x.filter((x) => x > 0).slice(0, 1)), Infinity);
    this.plot.show(this.lines, { ...this.page.look(), x: place.x, y: place.y,
      threshold: Math.max(1, 10 ** Math.floor(Math.log10(Number.isFinite(log) ? log : 1))),
      look: `${place.x} ${place.y} ${place.axis} ${document.documentElement.dataset.theme}` });
    this.#list();
    if (this.open) this.#fillTable();
  }

  #offer() {
    const { curves, id, filters = [] } = this.sketch;
    const more = this.page.place.more;
    const now = this.curves()[0];
    const values = filters.map((dim) => this.page.valuesOf(now.table, dim));
    // Nobody's choice is taken away while nothing else is to be chosen.
    const offered = JSON.stringify([now, values]);
    if (offered === this.offered) return;
    this.offered = offered;
    const tables = new Set(curves.map((curve) => curve.table)).size;
    refill(this.controls,
      curves.length > 1 ? choice("Field", curves.map((c) => [`${c.table}:${c.field}`,
        tables > 1 ? `${spoken(c.field)} (${spoken(c.table)})` : spoken(c.field)]),
      `${now.table}:${now.field}`, (value) => this.#chose("field", value)) : null,
      filters.map((dim, at) => choice(spoken(dim), [["all", "all"], ...values[at]
        .map((value) => [value, named({ [dim]: value }) || String(value)])],
      more[`${id}.${dim}`] ?? now.dims[dim] ?? "all", (value) => this.#chose(dim, value))));
  }

  #chose(what, value) {
    this.page.choose(`${this.sketch.id}.${what}`, value);
    this.plot.zoomTo(null);
    this.refresh();
    this.sketch.chosen?.();
  }

  #list() {
    refill(this.legend, this.lines.map((line) => {
      const last = line.value.findLastIndex((value) => value !== null);
      const wrong = reasons(line);
      return h("li", null, h("button", { type: "button", "aria-pressed": String(!line.hidden),
        title: `${line.hidden ? "Show" : "Hide"} ${line.name}`, onclick: () => this.#hide(line) },
      svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4,
        stroke: line.colour, "stroke-width": line.width + 0.5, "stroke-dasharray": line.dash.join(" ") })),
      h("span", { class: "what" }, line.name),
      h("span", { class: "value" }, within(line.value[last], line.stderr?.[last])),
      line.null ? h("span", { class: "null" }, `null ${number(line.null[last])}`) : null),
      wrong.length ? h("span", { class: "wrong" }, `✕ not interpretable: ${wrong.join("; ")}`) : null);
    }));
    const [first, last] = this.plot.span ?? [0, 0];
    this.holder.setAttribute("aria-label", `${this.sketch.title}: ${this.lines.length} lines from `
      + `${this.page.format(first)} to ${this.page.format(last)}. ${this.page.spokenMarks()} `
      + "The button Table has the numbers.");
  }

  #hide(line) {
    line.hidden = !line.hidden;
    const hidden = this.lines.filter((one) => one.hidden).map((one) => one.name);
    this.page.choose(`${this.sketch.id}.hidden`, hidden.join("|"));
    const at = this.lines.indexOf(line);
    this.#draw();
    this.legend.querySelectorAll("button")[at].focus();
  }

  #describe(asked) {
    const told = asked.map((curve) => [curve, this.page.declared(curve.table, curve.field)])
      .filter(([, field]) => field !== undefined);
    const one = told.length === 1;
    const each = told.map(([curve, field]) => h("p", null,
      one ? null : h("b", null, `${spoken(curve.field)}: `), field.help,
      field.unit ? ` In ${field.unit}.` : null,
      h("span", null, field.null ? ` Dotted: null, ${field.null}.` : " It has no null."),
      field.fooled_by ? h("span", null, h("b", null, " Fooled by: "), field.fooled_by) : null));
    const units = [...new Set(told.map(([, field]) => field.unit).filter(Boolean))].join(", ");
    const bands = told.some(([, field]) => field.stderr) ? "Bands: 95% intervals." : "";
    refill(this.caption, one ? each : h("details", { open: this.caption.querySelector("[open]") !== null },
      h("summary", null, `${units ? `In ${units}. ` : ""}Dotted: nulls. What each is, and what can fool it`), each),
    h("p", null, bands));
  }

  #point(x) {
    const focused = document.activeElement === this.holder;
    if (x === null || !(this.hovered || focused)) {
      this.tip.hidden = true;
      return;
    }
    const at = this.lines.filter((line) => !line.hidden && line.x.length)
      .map((line) => [line, nearest(line, x)]);
    const best = at.sort(([a, i], [b, j]) => (b.value[j] ?? -Infinity) - (a.value[i] ?? -Infinity));
    if (best.length === 0) return;
    const [line, i] = best[0];
    refill(this.tip, h("b", null, this.page.moment(line.run, line.x[i])),
      best.slice(0, MOST_TOLD).map(([one, k]) => h("div", null,
        h("span", { class: "what" }, one.name), h("span", { class: "value" },
          one.value[k] === null && one.validity && one.validity[k] !== "ok"
            ? `not interpretable: ${one.validity[k]}` : within(one.value[k], one.stderr?.[k])),
        one.null ? h("span", { class: "null" }, `null ${number(one.null[k])}`) : null)),
      best.length > MOST_TOLD ? h("div", null, `and ${best.length - MOST_TOLD} more`) : null);
    const right = this.plot.u.cursor.left < this.holder.clientWidth / 2;
    this.tip.classList.toggle("right", right);
    this.tip.hidden = false;
    if (focused) say(this.tip.innerText);
  }

  /** Of a part more is shown, where the service had thinned the whole. */
  #zoomed(zoom) {
    this.reset.hidden = zoom === null;
    if (!live) return;
    const [first, last] = this.plot.span ?? [0, 1];
    const times = zoom === null ? 1 : 2 ** Math.ceil(Math.log2((last - first) / (zoom.max - zoom.min)));
    const points = Math.min(MOST_POINTS, POINTS * Math.max(1, times));
    const thinned = this.lines.some((line) => line.x.length > this.points - 4);
    if (points === this.points || (points > this.points && !thinned)) return;
    this.points = points;
    this.refresh();
  }

  #toggleTable() {
    this.open = !this.open;
    this.asTable.setAttribute("aria-expanded", String(this.open));
    if (this.open) this.#fillTable();
    else refill(this.numbers);
  }

  #fillTable() {
    const [columns, rows] = rowsOf(this.lines, this.page.place.axis, this.plot.zoom);
    const every = Math.ceil(rows.length / MOST_ROWS) || 1;
    const shown = rows.filter((_row, at) => at % every === 0);
    refill(this.numbers, every > 1 ? h("p", null, `One of every ${every} rows; the CSV has all.`) : null,
      table(`Numbers of: ${this.sketch.title}`, columns.map((name, at) => [spoken(name), (row) =>
        (typeof row[at] === "number" && !Number.isInteger(row[at]) ? number(row[at]) : row[at] ?? "–")]), shown));
  }

  #download() {
    const [columns, rows] = rowsOf(this.lines, this.page.place.axis, this.plot.zoom);
    save(`${this.page.place.run.join("+")}-${this.sketch.id}.csv`, csv(columns, rows));
  }
}
