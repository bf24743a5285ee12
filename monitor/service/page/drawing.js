// What lies behind and beside the lines of a plot: bands of uncertainty, nulls, transitions, marks of
// what cannot be interpreted, and names at the ends.

import { styled } from "./colours.js";

const FONT = "11px system-ui, sans-serif";
const MOST_NAMES = 12;

function clipped(u, draw) {
  const { left, top, width, height } = u.bbox;
  u.ctx.save();
  u.ctx.beginPath();
  u.ctx.rect(left, top, width, height);
  u.ctx.clip();
  draw(u.ctx);
  u.ctx.restore();
}

/** Transitions as bands, and a line at the step that is chosen. */
export function drawMarks(u, how) {
  const { left, top, width, height } = u.bbox;
  const x = (value) => u.valToPos(value, "x", true);
  const px = devicePixelRatio;
  clipped(u, (ctx) => {
    for (const mark of how.marks) {
      const look = styled(`--${mark.state}`);
      ctx.fillStyle = look;
      const [from, to] = [x(mark.from), x(mark.to)];
      ctx.globalAlpha = mark.state === "retracted" ? 0.05 : 0.13;
      ctx.fillRect(from, top, Math.max(2 * px, to - from), height);
      if (mark.low !== null) {
        ctx.globalAlpha = 0.1;
        ctx.fillRect(x(mark.low), top, Math.max(px, x(mark.high) - x(mark.low)), height);
      }
      ctx.globalAlpha = 1;
      ctx.strokeStyle = look;
      ctx.lineWidth = px;
      ctx.setLineDash({ confirmed: [], provisional: [6 * px, 4 * px], retracted: [px, 4 * px] }[mark.state]);
      ctx.beginPath();
      ctx.moveTo(x(mark.at), top);
      ctx.lineTo(x(mark.at), top + height);
      ctx.stroke();
    }
    if (how.here !== null) {
      ctx.strokeStyle = styled("--text");
      ctx.globalAlpha = 0.5;
      ctx.setLineDash([]);
      ctx.lineWidth = px;
      ctx.beginPath();
      ctx.moveTo(x(how.here), top);
      ctx.lineTo(x(how.here), top + height);
      ctx.stroke();
    }
  });
  // Their numbers, as in the list of transitions, above the plot: those that would collide move on.
  let free = -Infinity;
  u.ctx.save();
  u.ctx.font = FONT.replace("11", String(11 * px));
  u.ctx.textBaseline = "bottom";
  u.ctx.textAlign = "left";
  for (const mark of [...how.marks].sort((a, b) => a.at - b.at)) {
    const place = x(mark.at);
    if (place < left || place > left + width) continue;
    const text = mark.state === "confirmed" || how.brief ? mark.name : `${mark.name} ${mark.state}`;
    const at = Math.max(place - 3 * px, free);
    if (at + u.ctx.measureText(text).width > left + width + 60 * px) continue;
    u.ctx.fillStyle = styled(`--${mark.state}`);
    u.ctx.fillText(text, at, top - 2 * px);
    free = at + u.ctx.measureText(text).width + 5 * px;
  }
  u.ctx.restore();
}

/** Of every line its 95% band, its null and that one's, and marks where it cannot be interpreted. */
export function drawLines(u, lines) {
  const px = devicePixelRatio;
  // Lines that have their null in common do not darken it.
  const drawn = new Set();
  const once = (line) => {
    const name = [line.null[0], line.null.at(-1), line.null_sd?.[0], line.x.length].join();
    return drawn.has(name) ? false : drawn.add(name);
  };
  // Many bands over each other are each lighter, so that the lines stay to be seen.
  const light = Math.min(0.16, 0.7 / lines.filter((line) => !line.hidden).length);
  clipped(u, (ctx) => {
    for (const line of lines) {
      if (line.hidden) continue;
      ctx.fillStyle = line.colour;
      ctx.strokeStyle = line.colour;
      if (line.stderr) {
        ctx.globalAlpha = light;
        area(u, line, line.value, line.stderr);
      }
      if (line.null && once(line)) {
        ctx.globalAlpha = 0.08;
        if (line.null_sd) area(u, line, line.null, line.null_sd);
        ctx.globalAlpha = 0.75;
        ctx.setLineDash([1.5 * px, 3.5 * px]);
        ctx.lineWidth = 1.2 * px;
        along(u, line.x, line.null);
        ctx.setLineDash([]);
      }
      ctx.globalAlpha = 1;
      if (line.validity) marks(u, line);
    }
  });
}

/** Where each line ends, its name, as far as they do not lie on each other. */
export function drawEnds(u, lines) {
  const px = devicePixelRatio;
  const { left, top, width, height } = u.bbox;
  const ends = [];
  for (const line of lines) {
    let last = line.value.length - 1;
    const right = u.scales.x.max;
    while (last >= 0 && (line.value[last] === null || line.x[last] > right)) last -= 1;
    if (line.hidden || last < 0) continue;
    const y = u.valToPos(line.value[last], "y", true);
    if (y >= top && y <= top + height) ends.push({ y, line });
  }
  u.ctx.save();
  u.ctx.font = FONT.replace("11", String(11 * px));
  u.ctx.textBaseline = "middle";
  u.ctx.textAlign = "left";
  let free = -Infinity;
  // Names keep a line's height apart; those for which there is no room are in the legend alone.
  for (const { y, line } of ends.sort((a, b) => a.y - b.y).slice(0, MOST_NAMES)) {
    const at = Math.max(y, free + 13 * px);
    if (at > y + 26 * px || at > top + height + 8 * px) continue;
    u.ctx.fillStyle = line.colour;
    const name = line.short.length > 11 ? `${line.short.slice(0, 10)}…` : line.short;
    u.ctx.fillText(name, left + width + 5 * px, at);
    free = at;
  }
  u.ctx.restore();
}

/** Strokes a curve, which stops where there is no value. */
function along(u, xs, ys) {
  let open = false;
  u.ctx.beginPath();
  for (let i = 0; i < xs.length; i += 1) {
    if (ys[i] === null || ys[i] === undefined) open = false;
    else {
      const place = [u.valToPos(xs[i], "x", true), u.valToPos(ys[i], "y", true)];
      if (open) u.ctx.lineTo(...place);
      else u.ctx.moveTo(...place);
      open = true;
    }
  }
  u.ctx.stroke();
}

/** Fills 1.96 standard deviations around a curve, in stretches without a gap. */
function area(u, line, centre, spread) {
  const { x } = line;
  let from = 0;
  const fill = (to) => {
    if (to - from < 2) return;
    const point = (i, sign) => {
      const y = u.valToPos(centre[i] + sign * 1.96 * spread[i], "y", true);
      // Below zero there is no place on a logarithmic scale: to the lower edge.
      return [u.valToPos(x[i], "x", true), Number.isFinite(y) ? y : u.bbox.top + u.bbox.height];
    };
    u.ctx.beginPath();
    for (let i = from; i < to; i += 1) u.ctx.lineTo(...point(i, 1));
    for (let i = to - 1; i >= from; i -= 1) u.ctx.lineTo(...point(i, -1));
    u.ctx.fill();
  };
  for (let i = 0; i <= x.length; i += 1) {
    const there = i < x.length && (centre[i] ?? null) !== null && (spread[i] ?? null) !== null;
    if (!there) {
      fill(i);
      from = i + 1;
    }
  }
}

/** Crosses at the lower edge, where a row says that it cannot be interpreted. */
function marks(u, line) {
  const px = devicePixelRatio;
  const y = u.bbox.top + u.bbox.height - 6 * px;
  u.ctx.lineWidth = 1.3 * px;
  u.ctx.beginPath();
  for (let i = 0; i < line.x.length; i += 1) {
    if (line.validity[i] === "ok") continue;
    const x = u.valToPos(line.x[i], "x", true);
    const r = 3 * px;
    u.ctx.moveTo(x - r, y - r);
    u.ctx.lineTo(x + r, y + r);
    u.ctx.moveTo(x - r, y + r);
    u.ctx.lineTo(x + r, y - r);
  }
  u.ctx.stroke();
}
