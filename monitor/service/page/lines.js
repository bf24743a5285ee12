// What the service answers of series, as lines of a plot.

import { ofLayer, ofNumber } from "./colours.js";
import { named, spoken } from "./words.js";

const DASHES = [[], [7, 3], [12, 4], [7, 3, 2, 3], [3, 3], [14, 3, 3, 3]];
const COLUMNS = ["value", "stderr", "null", "null_sd", "validity"];

/**
 * @param {Array<{run: string, field: string, fields: number, dims: Object, series: Object}>} all each a
 *   series of an answer, with its field, how many fields the figure has, and the dimensions asked for
 * @param {Object} page the runs, the layers, and where 0 is of each run
 * @param {Set<string>} hidden names of lines that are not to be shown
 * @returns {import("./plot.js").Line[]}
 */
export function linesOf(all, page, hidden) {
  const found = all.map((one) => ({ ...one, series: placed(one.series) }));
  const several = page.place.run.length > 1;
  const groups = [...new Set(found.map((one) => key(one)))];
  const used = new Map();
  const constant = same(found);
  return found.map((one) => {
    const { series, run } = one;
    const dims = series.dims ?? {};
    const layer = dims.layer ?? dims.source_layer;
    const colour = layer === undefined || layer === null
      ? ofNumber(groups.indexOf(key(one))) : ofLayer(layer, page.layers);
    const rank = used.get(colour) ?? 0;
    used.set(colour, rank + 1);
    const at = page.place.run.indexOf(run);
    const short = [one.fields > 1 ? spoken(one.field) : "", named(without(dims, [...constant, ...Object.keys(one.dims)]))].filter(Boolean).join(" ")
      || spoken(one.field);
    const name = several ? `${short} ${page.letter(run)}` : short;
    const shift = page.offset(run);
    const line = { name, short, run, dims, field: one.field, colour, shift,
      dash: DASHES[(several ? at : rank) % DASHES.length], width: rank === 0 || several ? 2 : 1.5,
      hidden: hidden.has(name), x: series.axis.map((x) => x - shift) };
    for (const column of COLUMNS) {
      if (series[column]?.some((value) => value !== null)) line[column] = series[column];
    }
    // As it is told: what cannot be interpreted is kept aside, and the line has a gap.
    line.told = line.value ?? series.axis.map(() => null);
    line.value = line.told.map((value, i) => ((line.validity?.[i] ?? "ok") === "ok" ? value : null));
    return line;
  });
}

// What these are the numbers of is only clear with both.
const NAMED = ["layer", "head", "neuron"];

/** The dimensions in which none differs: they need not be named. */
function same(found) {
  const [first, ...others] = found.map((one) => one.series.dims ?? {});
  return others.length === 0 ? [] : Object.keys(first).filter((dim) => !NAMED.includes(dim)
    && others.every((dims) => dims[dim] === first[dim]));
}

function without(dims, names) {
  return Object.fromEntries(Object.entries(dims).filter(([name]) => !names.includes(name)));
}

/** A series without the points of which it is not known where on the axis they lie. */
function placed(series) {
  if (!series.axis.includes(null)) return series;
  const there = (_value, i) => series.axis[i] !== null;
  const columns = Object.entries(series).map(([name, column]) => [name, Array.isArray(column) ? column.filter(there) : column]);
  return Object.fromEntries(columns);
}

/** What lines of different runs have in common. */
function key(one) {
  return `${one.field} ${JSON.stringify(one.series.dims ?? {})}`;
}

/** Why rows of a line cannot be interpreted, each reason with how often it is given. */
export function reasons(line) {
  const counts = new Map();
  for (const word of line.validity ?? []) {
    if (word !== "ok" && word !== null) counts.set(word, (counts.get(word) ?? 0) + 1);
  }
  return [...counts].map(([word, times]) => `${times} × ${word}`);
}

/** The index of the point of a line that is nearest to `x`, or -1. */
export function nearest(line, x) {
  let low = 0;
  let high = line.x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (line.x[middle] <= x) low = middle;
    else high = middle;
  }
  return high < 0 || Math.abs(line.x[low] - x) <= Math.abs(line.x[high] - x) ? Math.min(low, high) : high;
}

/** What is shown as rows of a table, all columns that the service gave: [columns, rows]. */
export function rowsOf(lines, axis, zoom) {
  const shown = lines.filter((line) => !line.hidden);
  const dims = [...new Set(shown.flatMap((line) => Object.keys(line.dims)))];
  const columns = COLUMNS.filter((c) => c === "value" || shown.some((line) => line[c]));
  const rows = shown.flatMap((line) => line.x.flatMap((x, i) => {
    if (zoom !== null && (x < zoom.min || x > zoom.max)) return [];
    return [[line.run, line.field, ...dims.map((dim) => line.dims[dim]), x + line.shift,
      line.told[i], ...columns.slice(1).map((c) => line[c]?.[i])]];
  }));
  return [["run", "field", ...dims, axis, ...columns], rows];
}
