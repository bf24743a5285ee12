// Where the reader is, in the fragment of the address: whoever opens it sees the same. The colour
// scheme is no part of it.

/**
 * @typedef {Object} Place
 * @property {string[]} run the runs that are shown; none: the list
 * @property {"step"|"tokens"|"time"} axis
 * @property {"linear"|"log"} x
 * @property {"linear"|"log"} y
 * @property {string} align the series whose transition is 0, or empty
 * @property {number|null} step null: the last one
 * @property {string} head as layer.head, or empty
 * @property {Object<string, string>} more the choices of single figures, such as "heads.field"
 */

const CHOICES = { axis: ["step", "tokens", "time"], x: ["linear", "log"], y: ["linear", "log"] };

/** The place that a fragment names; what it has wrong is left at the default. @returns {Place} */
export function read(fragment) {
  const query = new URLSearchParams(fragment.replace(/^#\/?(run)?\??/, ""));
  const place = { run: [...new Set(query.getAll("run"))], align: query.get("align") ?? "", more: {} };
  for (const [name, allowed] of Object.entries(CHOICES)) {
    place[name] = allowed.includes(query.get(name)) ? query.get(name) : allowed[0];
  }
  place.step = /^\d+$/.test(query.get("step") ?? "") ? Number(query.get("step")) : null;
  place.head = /^\d+\.\d+$/.test(query.get("head") ?? "") ? query.get("head") : "";
  for (const [name, value] of query) {
    if (name.includes(".")) place.more[name] = value;
  }
  return place;
}

/** The fragment that names a place. @param {Place} place */
export function written(place) {
  if (place.run.length === 0) return "#/";
  const query = new URLSearchParams(place.run.map((run) => ["run", run]));
  for (const [name, [usual]] of Object.entries(CHOICES)) {
    if (place[name] !== usual) query.set(name, place[name]);
  }
  if (place.align) query.set("align", place.align);
  if (place.step !== null) query.set("step", String(place.step));
  if (place.head) query.set("head", place.head);
  for (const name of Object.keys(place.more).sort()) query.set(name, place.more[name]);
  return `#/run?${query}`;
}
