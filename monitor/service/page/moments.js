// Where the measured steps of a run lie on the axis that is shown: in tokens and on the clock.

import { answer } from "./data.js";

const POINTS = 1200;

export class Moments {
  constructor() {
    this.known = new Map();
  }

  /** Learns it of a run, from its table of the fewest rows. */
  async learn(run, tables, axis) {
    const spec = [...tables.values()].filter((one) => one.table !== "transitions")
      .sort((a, b) => a.dims.length - b.dims.length)[0];
    const field = spec?.fields.find((one) => !one.per && !one.text);
    if (field === undefined) {
      this.known.set(run, { steps: [], places: [] });
      return;
    }
    const asked = { run, table: spec.table, field: field.name, points: POINTS, format: "columns", top: 1 };
    const axes = axis === "step" ? ["step"] : ["step", axis];
    // Which points are kept depends on the values alone: they are the same on every axis.
    const [steps, places] = await Promise.all(axes.map((one) => answer("/api/series", { ...asked, axis: one })
      .then((told) => told.series[0]?.axis ?? []).catch(() => [])));
    this.known.set(run, { steps, places: places ?? steps });
  }

  steps(run) {
    return this.known.get(run)?.steps ?? [];
  }

  /** Where the run begins on the axis. */
  start(run) {
    return this.known.get(run)?.places[0] ?? 0;
  }

  /** Where a step lies on the axis, between those that were measured. */
  onAxis(run, step) {
    const { steps, places } = this.known.get(run) ?? { steps: [], places: [] };
    return between(steps, places, step);
  }

  /** The measured step that is nearest to a place on the axis. */
  nearestStep(run, place) {
    const { steps, places } = this.known.get(run) ?? { steps: [], places: [] };
    let best = 0;
    places.forEach((at, i) => {
      if (Math.abs(at - place) < Math.abs(places[best] - place)) best = i;
    });
    return steps[best] ?? null;
  }
}

function between(from, to, at) {
  if (from.length < 2) return to[0] ?? at;
  let i = from.findIndex((known) => known >= at);
  if (i === -1) i = from.length - 1;
  i = Math.max(1, i);
  const share = (at - from[i - 1]) / (from[i] - from[i - 1]);
  return to[i - 1] + share * (to[i] - to[i - 1]);
}
