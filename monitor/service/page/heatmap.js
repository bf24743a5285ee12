// Layer × head as colours on a canvas, walked with the arrow keys: one cell at a time is an element, so
// that thousands of heads cost no more than one.

import { styled, viridis } from "./colours.js";
import { h, refill, unique } from "./dom.js";
import { number, within } from "./words.js";

const LEFT = 30;
const TOP = 16;

/**
 * @typedef {Object} Cell
 * @property {number|null} value
 * @property {number} [stderr]
 * @property {number} [null]
 * @property {string} validity
 */

export class HeatMap {
  /** @param {(layer: number, head: number) => void} opened */
  constructor(opened) {
    this.opened = opened;
    this.at = [0, 0];
    this.cells = new Map();
    this.rows = 0;
    this.columns = 0;
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.cell = h("div", { role: "gridcell", id: unique("cell"), class: "cell" });
    this.grid = h("div", { role: "grid", tabindex: "0", class: "grid", "aria-label": "Heads",
      "aria-activedescendant": this.cell.id, onkeydown: (event) => this.#pressed(event),
      onclick: (event) => this.#clicked(event), onmousemove: (event) => this.#over(event),
      onmouseleave: () => { this.tip.hidden = true; }, onfocus: () => this.#place() },
    this.canvas, h("div", { role: "row" }, this.cell));
    this.tip = h("div", { class: "tip", hidden: true });
    this.scale = h("canvas", { width: 160, height: 10, "aria-hidden": "true" });
    this.ends = h("span", null);
    this.element = h("div", { class: "stage" }, this.grid, this.tip,
      h("p", { class: "scale" }, "0", this.scale, this.ends,
        h("span", { class: "hatched", "aria-hidden": "true" }), "not interpretable"));
    this.sized = new ResizeObserver(() => this.draw());
    this.sized.observe(this.element);
  }

  /**
   * @param {Map<string, Cell>} cells by "layer.head"
   * @param {number} rows layers
   * @param {number} columns heads
   * @param {number} top the value above the null that has the last colour
   * @param {string} what the name of the field
   */
  show(cells, rows, columns, top, what) {
    Object.assign(this, { cells, rows, columns, top, what });
    this.at = [Math.min(this.at[0], rows - 1), Math.min(this.at[1], columns - 1)];
    this.grid.setAttribute("aria-rowcount", rows);
    this.grid.setAttribute("aria-colcount", columns);
    this.grid.setAttribute("aria-label", `${what}: layers as rows, heads as columns. Arrow keys move, `
      + "Enter opens a head.");
    this.draw();
    this.#place();
  }

  draw() {
    const width = this.element.clientWidth;
    if (width === 0 || this.rows === 0) return;
    this.wide = Math.max(2, Math.min(110, (width - LEFT - 2) / this.columns));
    this.high = Math.max(5, Math.min(36, 640 / this.rows));
    const px = devicePixelRatio;
    const size = [LEFT + this.wide * this.columns, TOP + this.high * this.rows];
    [this.canvas.width, this.canvas.height] = size.map((side) => Math.ceil(side * px));
    [this.canvas.style.width, this.canvas.style.height] = size.map((side) => `${side}px`);
    const ctx = this.canvas.getContext("2d");
    ctx.scale(px, px);
    this.#names(ctx);
    const gap = this.wide > 8 && this.high > 8 ? 1 : 0;
    for (const [name, cell] of this.cells) {
      const [layer, head] = name.split(".").map(Number);
      this.#cell(ctx, cell, LEFT + head * this.wide, TOP + layer * this.high, gap);
    }
    this.#legend();
  }

  #names(ctx) {
    ctx.font = "10px system-ui, sans-serif";
    ctx.fillStyle = styled("--quiet");
    ctx.textBaseline = "middle";
    const every = (room, need) => Math.max(1, Math.ceil(need / room));
    ctx.textAlign = "right";
    for (let row = 0; row < this.rows; row += every(this.high, 12)) {
      ctx.fillText(String(row), LEFT - 6, TOP + (row + 0.5) * this.high);
    }
    ctx.textAlign = "center";
    for (let column = 0; column < this.columns; column += every(this.wide, 20)) {
      ctx.fillText(String(column), LEFT + (column + 0.5) * this.wide, TOP / 2);
    }
  }

  #cell(ctx, cell, x, y, gap) {
    const [wide, high] = [this.wide - gap, this.high - gap];
    if (cell.validity !== "ok" || cell.value === null) {
      hatch(ctx, x, y, wide, high);
      return;
    }
    const share = (cell.value - (cell.null ?? 0)) / this.top;
    const [red, green, blue] = viridis(share);
    ctx.fillStyle = `rgb(${red} ${green} ${blue})`;
    // Without a gap cells overlap by less than a pixel, or the ground would show between them.
    const over = gap === 0 ? 0.6 : 0;
    ctx.fillRect(x, y, wide + over, high + over);
    if (this.wide >= 40 && this.high >= 18) {
      ctx.fillStyle = red * 0.3 + green * 0.6 + blue * 0.1 > 120 ? "#000" : "#fff";
      ctx.fillText(String(Number(cell.value.toPrecision(2))), x + wide / 2, y + high / 2);
    }
  }

  #legend() {
    const ctx = this.scale.getContext("2d");
    for (let x = 0; x < this.scale.width; x += 1) {
      ctx.fillStyle = `rgb(${viridis(x / this.scale.width).join(" ")})`;
      ctx.fillRect(x, 0, 1, this.scale.height);
    }
    refill(this.ends, `${number(this.top)} above its null`);
  }

  #words(layer, head) {
    const cell = this.cells.get(`${layer}.${head}`);
    if (cell === undefined) return `head ${layer}.${head}: not there`;
    if (cell.validity !== "ok") return `head ${layer}.${head}: not interpretable, ${cell.validity}`;
    const beside = cell.null === undefined || cell.null === null ? "" : `, null ${number(cell.null)}`;
    return `head ${layer}.${head}: ${within(cell.value, cell.stderr)}${beside}`;
  }

  #place() {
    const [layer, head] = this.at;
    this.cell.setAttribute("aria-label", this.#words(layer, head));
    this.cell.parentElement.setAttribute("aria-rowindex", layer + 1);
    this.cell.setAttribute("aria-colindex", head + 1);
    const box = { left: LEFT + head * this.wide, top: TOP + layer * this.high, width: this.wide, height: this.high };
    for (const [name, value] of Object.entries(box)) this.cell.style[name] = `${value}px`;
    if (document.activeElement === this.grid && this.grid.matches(":focus-visible")) this.#tell(layer, head);
  }

  #tell(layer, head) {
    this.tip.textContent = this.#words(layer, head);
    this.tip.hidden = false;
  }

  #pressed(event) {
    if (this.rows === 0) return;
    const [layer, head] = this.at;
    const last = [this.rows - 1, this.columns - 1];
    const moves = {
      ArrowUp: [layer - 1, head], ArrowDown: [layer + 1, head], ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1], Home: [layer, 0], End: [layer, last[1]], PageUp: [0, head],
      PageDown: [last[0], head] };
    if (event.key === "Enter" || event.key === " ") this.opened(layer, head);
    else if (event.key in moves) {
      this.at = moves[event.key].map((to, side) => Math.min(last[side], Math.max(0, to)));
      this.#place();
    } else return;
    event.preventDefault();
  }

  #under(event) {
    const box = this.canvas.getBoundingClientRect();
    const head = Math.floor((event.clientX - box.left - LEFT) / this.wide);
    const layer = Math.floor((event.clientY - box.top - TOP) / this.high);
    const inside = head >= 0 && layer >= 0 && head < this.columns && layer < this.rows;
    return inside ? [layer, head] : null;
  }

  #clicked(event) {
    const under = this.#under(event);
    if (under === null) return;
    this.at = under;
    this.#place();
    this.opened(...under);
  }

  #over(event) {
    const under = this.#under(event);
    this.tip.hidden = under === null;
    if (under !== null) this.#tell(...under);
  }
}

function hatch(ctx, x, y, wide, high) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(x, y, wide, high);
  ctx.clip();
  ctx.strokeStyle = styled("--quiet");
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let at = -high; at < wide; at += 5) {
    ctx.moveTo(x + at, y + high);
    ctx.lineTo(x + at + high, y);
  }
  ctx.stroke();
  ctx.restore();
}
