// Lines over the course of training, with their uncertainty, their nulls, what could not be
// interpreted, and transitions. uPlot draws axes and lines; all else is drawn here around them.
/* global uPlot */

import { styled } from "./colours.js";
import { drawEnds, drawLines, drawMarks } from "./drawing.js";
import { number } from "./words.js";

/**
 * @typedef {Object} Line one series; `x` ascends. Where there is no such column it is absent.
 * @property {string} name
 * @property {string} run
 * @property {string} colour
 * @property {number[]} dash
 * @property {number} width
 * @property {(number|null)[]} x
 * @property {(number|null)[]} value null where it was not measured or cannot be interpreted
 * @property {(number|null)[]} [stderr]
 * @property {(number|null)[]} [null]
 * @property {(number|null)[]} [null_sd]
 * @property {string[]} [validity]
 * @property {boolean} hidden
 */

const HEIGHT = 250;
const SMALL = 150;
const ZOOM = 0.6;
const DRAG = 4;

export class Plot {
  /**
   * @param {HTMLElement} holder
   * @param {Object} told
   * @param {boolean} [told.brief] a small one, without names at the ends
   * @param {(x: number) => void} told.picked a click, or Enter at the cursor
   * @param {(plot: Plot, x: number|null) => void} told.pointed where the cursor is
   * @param {(zoom: {min: number, max: number}|null) => void} told.zoomed
   */
  constructor(holder, told) {
    this.holder = holder;
    this.told = told;
    this.zoom = null;
    this.lines = [];
    this.u = null;
    holder.tabIndex = 0;
    holder.addEventListener("keydown", (event) => this.#pressed(event));
    this.sized = new ResizeObserver(() => this.#fit());
    this.sized.observe(holder);
  }

  /**
   * Draws lines; zoom and cursor stay where they are.
   * @param {Line[]} lines
   * @param {Object} how marks, here (the chosen step), format of x, x and y (linear or log), unit
   */
  show(lines, how) {
    const same = this.u !== null && lines.length === this.lines.length
      && how.look === this.how.look && lines.every((line, at) =>
        line.colour === this.lines[at].colour && line.hidden === this.lines[at].hidden);
    this.lines = lines;
    this.how = how;
    this.span = spanned(lines);
    const data = joined(lines);
    if (same) {
      this.u.setData(data, false);
      this.#rescale();
    } else {
      this.u?.destroy();
      this.u = new uPlot(this.#options(), data, this.holder);
      this.#rescale();
    }
  }

  /** Draws again, as after a change of the colour scheme or of what is chosen. */
  redraw(how) {
    Object.assign(this.how, how);
    this.u?.redraw(false, false);
  }

  /** Shows from `min` to `max`; null: all. */
  zoomTo(zoom) {
    this.zoom = zoom;
    this.#rescale();
    this.told.zoomed(zoom);
  }

  close() {
    this.sized.disconnect();
    this.u?.destroy();
    this.u = null;
  }

  #rescale() {
    if (this.u === null) return;
    const [min, max] = this.span;
    this.u.setScale("x", this.zoom ?? { min, max: max > min ? max : min + 1 });
  }

  #fit() {
    const width = this.holder.clientWidth;
    if (this.u !== null && width > 0 && width !== this.u.width) {
      this.u.setSize({ width, height: this.u.height });
    }
  }

  #options() {
    const quiet = styled("--quiet");
    const axis = { stroke: quiet, font: "11px system-ui, sans-serif",
      grid: { stroke: styled("--grid"), width: 1 }, ticks: { stroke: styled("--grid"), width: 1, size: 4 } };
    const positive = this.lines.every((line) => line.value.every((v) => v === null || v > 0));
    const largest = Math.max(1e-9, ...extremes(this.lines, null).map(Math.abs));
    // What is not above 0 has no logarithm: around it the scale is linear, as that of asinh is.
    const around = 10 ** Math.floor(Math.log10(largest / 100));
    const log = positive ? { distr: 3 } : { distr: 4, asinh: around };
    const decades = (least) => ({ filter: (_u, splits) => splits,
      splits: (_u, _axis, min, max) => powers(min, max, least) });
    return {
      width: Math.max(200, this.holder.clientWidth),
      height: this.told.brief ? SMALL : HEIGHT,
      padding: [16, this.told.brief ? 20 : 64, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        sync: { key: "x", scales: ["x", null], setSeries: false,
          filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        bind: {
          dblclick: () => () => this.zoomTo(null),
        },
      },
      scales: {
        x: { time: false, ...(this.how.x === "log" ? { distr: 4, asinh: this.how.threshold } : {}),
          range: (_u, min, max) => [min, max] },
        y: { ...(this.how.y === "log" ? log : {}),
          range: () => (this.how.y === "log" && positive ? above(this.lines, this.zoom)
            : padded(extremes(this.lines, this.zoom))) },
      },
      axes: [
        { ...axis, size: 26, ...(this.how.x === "log" ? decades(this.how.threshold) : {}), values: (_u, splits) => splits.map((v) => (v === null ? "" : this.how.format(v))) },
        { ...axis, size: 56, ...(this.how.y === "log" ? decades(positive ? 0 : around) : {}), values: (_u, splits) => splits.map((v) => (v === null ? "" : number(v))) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        label: line.name, stroke: line.colour, width: line.width, dash: line.dash,
        show: !line.hidden, points: { show: (_u, _at, from, to) => to - from < 40, size: 4 } }))],
      hooks: {
        ready: [(u) => this.#clicks(u)],
        drawClear: [(u) => { drawMarks(u, { ...this.how, brief: this.told.brief }); drawLines(u, this.lines); }],
        draw: [(u) => { if (!this.told.brief) drawEnds(u, this.lines); }],
        setCursor: [(u) => this.told.pointed(this, u.cursor.left < 0 ? null : u.posToVal(u.cursor.left, "x"))],
        setSelect: [(u) => this.#selected(u)],
      },
    };
  }

  #clicks(u) {
    let down = 0;
    u.over.addEventListener("mousedown", (event) => { down = event.clientX; });
    u.over.addEventListener("click", (event) => {
      // What follows a drag is no click.
      if (Math.abs(event.clientX - down) < DRAG) this.told.picked(u.posToVal(event.offsetX, "x"));
    });
  }

  #selected(u) {
    const { left, width } = u.select;
    if (width < DRAG) return;
    const zoom = { min: u.posToVal(left, "x"), max: u.posToVal(left + width, "x") };
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.zoomTo(zoom);
  }

  #pressed(event) {
    if (this.u === null || event.target !== this.holder) return;
    const { width } = this.u.over.getBoundingClientRect();
    const at = this.u.cursor.left < 0 ? width : this.u.cursor.left;
    const move = (by) => this.u.setCursor({ left: Math.min(width - 1, Math.max(0, at + by)), top: 0 });
    const scaled = (by) => {
      const [low, high] = [0, width].map((p) => this.u.posToVal(at + (p - at) * by, "x"));
      const [min, max] = this.span;
      this.zoomTo(low <= min && high >= max ? null : { min: Math.max(low, min), max: Math.min(high, max) });
    };
    const keys = {
      ArrowLeft: () => move(event.shiftKey ? -50 : -8),
      ArrowRight: () => move(event.shiftKey ? 50 : 8),
      Home: () => move(-width),
      End: () => move(width),
      "+": () => scaled(ZOOM),
      "-": () => scaled(1 / ZOOM),
      Escape: () => this.zoomTo(null),
      Enter: () => this.told.picked(this.u.posToVal(at, "x")),
    };
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  }
}

/** Lines of different x as uPlot has them: where one has no point it goes on, at null it stops. */
function joined(lines) {
  if (lines.length === 0) return [[]];
  return uPlot.join(lines.map((line) => [line.x, line.value]));
}

function spanned(lines) {
  const firsts = lines.filter((line) => line.x.length).map((line) => line.x[0]);
  const lasts = lines.filter((line) => line.x.length).map((line) => line.x.at(-1));
  return firsts.length ? [Math.min(...firsts), Math.max(...lasts)] : [0, 1];
}

/** The lowest and the highest of what is drawn in the stretch, bands included. */
function extremes(lines, zoom) {
  let low = Infinity;
  let high = -Infinity;
  const seen = (value, by) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return;
    const spread = Number.isFinite(by) ? 1.96 * by : 0;
    low = Math.min(low, value - spread);
    high = Math.max(high, value + spread);
  };
  for (const line of lines) {
    if (line.hidden) continue;
    for (let i = 0; i < line.x.length; i += 1) {
      if (zoom !== null && (line.x[i] < zoom.min || line.x[i] > zoom.max)) continue;
      seen(line.value[i], line.stderr?.[i]);
      if (line.value[i] !== null) seen(line.null?.[i], line.null_sd?.[i]);
    }
  }
  return low <= high ? [low, high] : [0, 1];
}

/** From the lowest to the highest of positive lines; bands may go below. */
function above(lines, zoom) {
  const bare = lines.map((line) => ({ ...line, stderr: undefined, null_sd: undefined,
    null: line.null?.map((value) => (value > 0 ? value : null)) }));
  const [low, high] = extremes(bare, zoom);
  return [low / 1.3, high * 1.3];
}

/** Powers of ten, and where these are few what lies between; from `least` on to both sides of 0. */
function powers(min, max, least) {
  const first = Math.floor(Math.log10(least || Math.max(min, 1e-30)));
  const last = Math.ceil(Math.log10(Math.max(Math.abs(min), Math.abs(max))));
  const made = (parts) => {
    const up = [];
    for (let power = first; power <= last; power += 1) up.push(...parts.map((part) => part * 10 ** power));
    const both = least ? [...up.map((value) => -value).reverse(), 0, ...up] : up;
    return both.filter((value) => value >= min && value <= max);
  };
  const few = made([1]);
  return few.length >= 3 ? few : made([1, 2, 5]);
}

function padded([low, high]) {
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}
