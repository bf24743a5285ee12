// What a report answers from the tables that it has in itself, as the service would.

const PARTS = ["", "_stderr", "_null", "_null_sd"];

/**
 * @typedef {Object} Stored one table of one run: its rows, in order of steps
 * @property {number[]} steps
 * @property {Array<number|null>} tokens at each step
 * @property {number[]} time at each step, seconds since the epoch
 * @property {number[]} rows how many of them are of each step
 * @property {Object<string, Array>} columns
 */

/**
 * @param {{runs: Object[], tables: Object<string, Object[]>, rows: Object<string, Object<string, Stored>>,
 *   transitions: Object<string, Object[]>, leads: Object<string, Object>}} report
 * @returns {(path: string, params: Object) => Object|null} null where the report does not have it
 */
export function answering(report) {
  const of = (run, table) => report.rows[run]?.[table] ?? null;
  const spec = (run, table) => report.tables[run].find((one) => one.table === table);
  const answers = {
    "/api/runs": () => report.runs,
    "/api/tables": ({ run }) => report.tables[run] ?? null,
    "/api/transitions": ({ run }) => [run].flat().flatMap((one) => report.transitions[one] ?? []),
    "/api/leads": ({ axis = "step" }) => report.leads[axis] ?? null,
    "/api/rows": (asked) => {
      const stored = of(asked.run, asked.table);
      return stored && rowsAt(stored, spec(asked.run, asked.table), asked);
    },
    "/api/series": (asked) => {
      const stored = of(asked.run, asked.table);
      return stored && seriesOf(stored, spec(asked.run, asked.table), asked);
    },
  };
  return (path, params) => answers[path]?.(params) ?? null;
}

/** The rows of the last measurement at or before a step. */
function rowsAt(stored, spec, { run, table, step = null, field = null }) {
  const { steps, rows, columns } = stored;
  const at = step === null ? steps.length - 1 : steps.findLastIndex((known) => known <= step);
  if (at < 0) return null;
  const first = rows.slice(0, at).reduce((sum, count) => sum + count, 0);
  const wanted = field === null ? null : new Set([field].flat());
  const shown = spec.fields.filter((one) => wanted === null || wanted.has(one.name)).flatMap((one) =>
    PARTS.map((part) => one.name + part));
  const names = [...spec.dims.map((dim) => dim.name), ...shown, "n", "validity"].filter((name) => name in columns);
  return { table, run, step: steps[at], steps,
    columns: Object.fromEntries(names.map((name) => [name, columns[name].slice(first, first + rows[at])])) };
}

/** The series of a field along an axis. */
function seriesOf(stored, spec, { run, table, field, axis = "step", top = null, ...more }) {
  const { columns } = stored;
  if (!(field in columns)) return null;
  const places = stored[axis === "step" ? "steps" : axis].flatMap((place, i) => Array(stored.rows[i]).fill(place));
  const dims = spec.dims.map((dim) => dim.name);
  const fixed = dims.filter((dim) => !["", null, undefined].includes(more[dim]));
  const parts = PARTS.filter((part) => field + part in columns);
  const found = new Map();
  for (let row = 0; row < places.length; row += 1) {
    if (fixed.some((dim) => String(columns[dim][row]) !== String(more[dim]))) continue;
    const key = dims.map((dim) => columns[dim][row]).join(" ");
    if (!found.has(key)) {
      found.set(key, { run, dims: Object.fromEntries(dims.map((dim) => [dim, columns[dim][row]])), axis: [],
        ...Object.fromEntries(parts.map((part) => [part.slice(1) || "value", []])), validity: [] });
    }
    const series = found.get(key);
    series.axis.push(places[row]);
    series.validity.push(columns.validity[row]);
    for (const part of parts) series[part.slice(1) || "value"].push(columns[field + part][row]);
  }
  let series = [...found.values()];
  if (top !== null) {
    series = series.map((one) => [reached(one), one]).filter(([best]) => Number.isFinite(best))
      .sort(([a], [b]) => b - a).slice(0, top).map(([, one]) => one);
  }
  for (const one of series) if (one.validity.every((word) => word === "ok")) delete one.validity;
  return { table, axis, field: spec.fields.find((one) => one.name === field), series };
}

/** How far a series was ever above its null. */
function reached(series) {
  const above = series.value.map((value, i) => (value === null || series.validity[i] !== "ok" ? -Infinity
    : value - (series.null?.[i] ?? 0)));
  return above.reduce((a, b) => Math.max(a, b), -Infinity);
}
