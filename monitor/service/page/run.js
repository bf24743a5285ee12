// The page of one run, or of several over each other.

import { answer } from "./data.js";
import { choice, h, refill, say, switches } from "./dom.js";
import { Figure } from "./figure.js";
import { HeadPanel, StepSlider } from "./heads.js";
import { Moments } from "./moments.js";
import { moreOf } from "./parts.js";
import { stateOf } from "./runs.js";
import { headCurves, sections } from "./sections.js";
import { gathered } from "./transitions.js";
import { about, ago, lasting, whole } from "./words.js";

const AXES = { step: "Step", tokens: "Tokens", time: "Wall clock" };

export class RunPage {
  /**
   * @param {HTMLElement} holder
   * @param {import("./place.js").Place} place
   * @param {(place: Object) => void} moved keeps the permalink
   * @param {(place: Object) => void} opened shows another set of runs
   */
  constructor(holder, place, moved, opened) {
    Object.assign(this, { holder, place, opened });
    this.keep = () => moved(this.place);
    this.parts = [];
    this.transitions = [];
    this.tables = new Map();
    this.learnt = new Map();
    this.layers = 1;
    this.moments = new Moments();
    // Whether the reader did something: only then is the focus moved.
    this.entered = false;
    this.seen = new IntersectionObserver((entries) => this.#see(entries), { rootMargin: "300px" });
  }

  async open() {
    this.top = h("div", { class: "top" });
    this.facts = h("div");
    this.others = h("div");
    this.offered = "";
    refill(this.top, this.facts, this.others);
    this.bar = h("div", { class: "bar2" });
    refill(this.holder, this.top, this.bar);
    await this.#meet();
    const known = this.infos.map((info) => info.run);
    const absent = this.#absent();
    if (absent.length) {
      refill(this.holder, h("h1", null, "No such run"), h("p", { class: "nothing" },
        `This address names ${absent.join(", ")}, which is not here. `,
        known.length ? `There are: ${known.join(", ")}.` : "There is no run yet."),
      h("p", null, h("a", { href: "#/" }, "All runs")));
      return;
    }
    await this.#declare();
    await Promise.all([this.#layers(), this.#locate()]);
    this.#build();
  }

  #absent() {
    return this.place.run.filter((run) => !this.infos.some((info) => info.run === run));
  }

  /** Learns the declarations of the tables of the runs, and says whether there are more now. */
  async #declare() {
    const told = await Promise.all(this.place.run.map((run) => answer("/api/tables", { run })));
    // That something is said of changes changes nothing of what is there to be seen.
    const count = () => this.tables.size - Number(this.has("transitions"));
    const before = count();
    for (const spec of told.flat()) if (!this.tables.has(spec.table)) this.tables.set(spec.table, spec);
    return count() > before;
  }

  /** What is at the head of the page: the runs and their states. */
  async #meet() {
    this.infos = await answer("/api/runs");
    const mine = this.place.run.map((run) => this.infos.find((info) => info.run === run)).filter(Boolean);
    const others = this.infos.filter((info) => !this.place.run.includes(info.run)).map((info) => info.run);
    const several = mine.length > 1;
    refill(this.facts, h("h1", null, several ? `${mine.length} runs over each other` : mine[0]?.run ?? ""),
      h("ul", { class: "facts" }, mine.map((info) => h("li", null,
        several ? h("b", null, `${this.letter(info.run)} ${info.run}`) : null, stateOf(info),
        h("span", null, `step ${whole(info.last_step)}`), h("span", null, `${about(info.tokens)} tokens`),
        h("span", null, `${whole(info.measurements)} measurements`), h("span", null, `last ${ago(info.time)}`),
        info.model ? h("span", null, `${info.model}, ${about(info.parameters)} parameters`) : null,
        info.seed === null || info.seed === undefined ? null : h("span", null, `seed ${info.seed}`),
        several ? h("button", { type: "button", "aria-label": `Leave out ${info.run}`,
          onclick: () => this.#with(this.place.run.filter((run) => run !== info.run)) }, "Leave out") : null))));
    if (others.join() === this.offered) return;
    this.offered = others.join();
    refill(this.others, others.length ? choice("Lay another run over it", [["", "choose"], ...others], "",
      (run) => this.#with([...this.place.run, run])) : null);
  }

  #with(run) {
    this.opened({ ...this.place, run });
  }

  /** How many layers the model has, so that a layer has one colour everywhere. */
  async #layers() {
    const table = ["residual", "logit_lens", "neurons", "induction"].find((name) => this.tables.has(name))
      ?? [...this.tables.values()].find((spec) => spec.dims.some((dim) => dim.name === "layer"))?.table;
    if (table === undefined) return;
    const [field] = this.tables.get(table).fields;
    const told = await Promise.all(this.place.run.map((run) =>
      answer("/api/rows", { run, table, field: field.name }).catch(() => ({ columns: { layer: [] } }))));
    this.layers = 1 + told.flatMap(({ columns }) => columns.layer).reduce((a, b) => Math.max(a, b), 0);
  }

  /** Where steps lie on the axis, and the transitions. */
  async #locate() {
    const { run, axis } = this.place;
    await Promise.all(run.map((name) => this.moments.learn(name, this.tables, axis)));
    this.transitions = gathered(await answer("/api/transitions", { run }));
  }

  #build() {
    this.curves = headCurves(this.tables);
    this.slider = new StepSlider((step) => { this.place.step = step; this.keep(); this.moved(); });
    const built = sections(this.tables).map((section) => this.#section(section));
    this.panel = this.parts.find((part) => part instanceof HeadPanel);
    this.#controls();
    refill(this.holder, this.top, this.bar, h("p", { class: "unseen", id: "plot-keys" },
      "Arrow keys move the cursor, plus and minus zoom, Escape shows all, Enter chooses the step."),
    h("nav", { class: "contents", "aria-label": "Sections" }, built.map(({ id, title }) =>
      h("a", { href: `#${id}`, onclick: (event) => this.#jump(event, id) }, title))),
    built.map(({ element }) => element));
    for (const part of this.parts) {
      this.seen.observe(part.element);
      if (part.always) this.#freshen(part);
    }
    // What is hidden is never seen to come into view.
    this.panel?.refresh();
    this.#slide();
  }

  #controls() {
    const { place } = this;
    const set = (name) => (value) => { place[name] = value; this.keep(); this.#again(); };
    const series = [...new Set(this.transitions.map((one) => one.series))];
    refill(this.bar, switches("Axis", Object.entries(AXES), place.axis, set("axis")),
      switches("Horizontal", [["linear", "Linear"], ["log", "Log"]], place.x, set("x")),
      switches("Vertical", [["linear", "Linear"], ["log", "Log"]], place.y, set("y")),
      series.length ? choice("Align at", [["", "start"], ...series], place.align, set("align")) : null,
      this.has("induction") || this.has("circuit") || this.curves.length ? this.slider.element : null);
  }

  #section({ id, title, figures, missing }) {
    const made = figures.map((sketch) => new Figure(sketch, this));
    const more = moreOf(id, this, made);
    this.parts.push(...made, ...more);
    const beside = [...made, ...more.filter((part) => part.beside)];
    const below = more.filter((part) => !part.beside);
    const element = h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title),
      beside.length ? h("div", { class: "cards" }, beside.map((part) => part.element)) : null,
      below.map((part) => part.element),
      beside.length + below.length ? null : h("p", { class: "nothing card" }, missing));
    return { id, title, element };
  }

  async #see(entries) {
    for (const entry of entries) {
      const part = this.parts.find((one) => one.element === entry.target);
      if (part === undefined) continue;
      part.visible = entry.isIntersecting;
      if (part.visible && part.stale !== false) this.#freshen(part);
    }
  }

  #freshen(part) {
    part.stale = false;
    return part.refresh().catch((error) => console.warn(error.message));
  }

  /** Asks anew for what is seen now, and later for the rest. */
  #freshenAll(which = () => true) {
    return Promise.all(this.parts.filter(which).map((part) => {
      part.stale = true;
      return part.visible || part.always ? this.#freshen(part) : null;
    }));
  }

  async #again() {
    await this.#locate();
    for (const part of this.parts) part.plot?.zoomTo(null);
    await this.#freshenAll();
  }

  /** What was measured of a run is shown; zoom, slider and focus stay. */
  async update() {
    await this.#meet();
    if (this.#absent().length) return;
    if (await this.#declare() || this.slider === undefined) {
      // Another probe has begun: there are more sections, and more to choose from.
      const { scrollY } = window;
      this.#leave();
      await this.open();
      scrollTo({ top: scrollY, behavior: "instant" });
      return;
    }
    const before = new Set(this.transitions.map((one) => `${one.series}, ${one.state}`));
    await this.#locate();
    const now = this.transitions.map((one) => `${one.series}, ${one.state}`).filter((word) => !before.has(word));
    if (now.length) {
      say(`Now said: ${now.join("; ")}.`);
      this.#controls();
    }
    await Promise.all([this.#freshenAll(), this.#slide()]);
  }

  /** The chosen step has changed. */
  async moved() {
    for (const part of this.parts) part.restyle?.();
    await Promise.all([this.#freshenAll((part) => part.stepped), this.#slide()]);
  }

  async #slide() {
    const steps = this.moments.steps(this.one());
    this.slider.show(steps, this.place.step);
  }

  /** The colours have changed. */
  restyle() {
    this.#freshenAll();
  }

  #leave() {
    this.seen.disconnect();
    this.slider?.close();
    for (const part of this.parts) part.close?.();
    this.parts = [];
  }

  close() { this.#leave(); }

  // What figures ask of the page.

  has(table) { return this.tables.has(table); }

  declared(table, field) { return this.tables.get(table)?.fields.find((one) => one.name === field); }

  /** The run of which what is of one run and step is shown. */
  one() {
    const chosen = this.place.more["map.run"];
    return this.place.run.includes(chosen) ? chosen : this.place.run[0];
  }

  /** What a run is called beside others. */
  letter(run) { return String.fromCodePoint(65 + this.place.run.indexOf(run)); }

  async learn(table) {
    if (this.learnt.has(table)) return;
    const [field] = this.tables.get(table).fields;
    const told = await answer("/api/rows", { run: this.place.run[0], table, field: field.name }).catch(() => ({ columns: {} }));
    this.learnt.set(table, told.columns);
  }

  valuesOf(table, dim) {
    const values = [...new Set(this.learnt.get(table)?.[dim] ?? [])];
    return values.sort((a, b) => (typeof a === "number" ? a - b : a.localeCompare(b)));
  }

  choose(name, value) {
    if (value) this.place.more[name] = value;
    else delete this.place.more[name];
    this.keep();
  }

  aligned(run) { return !this.place.align || this.#anchor(run) !== undefined; }

  #anchor(run) {
    return this.transitions.find((one) => one.run === run && one.series === this.place.align
      && one.state !== "retracted");
  }

  /** What is subtracted of the axis of a run: its start on the clock, its transition where aligned. */
  offset(run) {
    const anchor = this.place.align ? this.#anchor(run) : undefined;
    if (anchor !== undefined) return this.moments.onAxis(run, anchor.at);
    return this.place.axis === "time" ? this.moments.start(run) : 0;
  }

  look() {
    const on = (run, step) => this.moments.onAxis(run, step) - this.offset(run);
    const several = this.place.run.length > 1;
    const marks = this.transitions.filter((one) => this.aligned(one.run)).map((one) => ({
      name: several ? one.name + this.letter(one.run) : one.name, state: one.state, series: one.series, one,
      from: on(one.run, one.from), at: on(one.run, one.at), to: on(one.run, one.to),
      low: one.low === null ? null : on(one.run, one.low), high: one.high === null ? null : on(one.run, one.high) }));
    const here = this.place.step === null ? null : on(this.one(), this.place.step);
    return { marks, here, format: (x) => this.format(x) };
  }

  /** The transitions in the charts, in words. */
  spokenMarks() {
    const words = this.transitions.map((one) => `${one.name}, ${one.series}, ${one.state} at ${whole(one.at)}`);
    return words.length ? `Transitions: ${words.join("; ")}.` : "No transition.";
  }

  format(x) {
    return this.place.axis === "time" ? (x < 0 ? `−${lasting(-x)}` : lasting(x))
      : Math.abs(x) >= 1e5 ? about(x) : whole(x);
  }

  /** Where a point lies, in words. */
  moment(run, x) {
    const at = x + this.offset(run);
    if (this.place.axis === "time") return new Date(at * 1000).toLocaleString();
    const from = this.place.align ? `, ${this.format(x)} from the transition` : "";
    return `${AXES[this.place.axis].toLowerCase()} ${whole(at)}${from}`;
  }

  /** A place in a chart was chosen: a transition that is there, or else the step. */
  pick(x) {
    this.entered = true;
    const { marks } = this.look();
    const hit = marks.find((mark) => mark.to > mark.from && x >= mark.from && x <= mark.to);
    if (hit) {
      const button = this.holder.querySelector(`[data-transition="${hit.one.name}"]`);
      button?.scrollIntoView({ block: "center" });
      button?.focus();
      return;
    }
    this.place.step = this.moments.nearestStep(this.one(), x + this.offset(this.one()));
    this.keep();
    say(`Step ${this.place.step} is chosen.`);
    this.moved();
  }

  openHead(head) {
    this.entered = true;
    const before = this.place.head;
    this.place.head = head;
    this.keep();
    this.panel?.refresh();
    if (head === "" && before) this.holder.querySelector(".grid")?.focus();
  }

  /** Shows the step of a transition. */
  goto(one) {
    this.place.step = this.moments.nearestStep(one.run, this.moments.onAxis(one.run, one.at));
    this.choose("map.run", this.place.run.length > 1 ? one.run : "");
    this.moved();
    this.holder.querySelector("#heads")?.scrollIntoView();
    say(`Step ${this.place.step}, where ${one.series} is.`);
  }

  #jump(event, id) {
    event.preventDefault();
    const section = this.holder.querySelector(`#${id}`);
    section.scrollIntoView();
    const heading = section.querySelector("h2");
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
  }
}
