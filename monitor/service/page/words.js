// Numbers, names and times in words.

const counted = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** A whole number with its thousands apart. */
export const whole = (value) => (value === null || value === undefined ? "–" : counted.format(value));

/** About how many: 3.3M. */
export const about = (value) => (value === null || value === undefined ? "–" : compact.format(value));

/** A measured number, to four figures. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return size >= 1e4 ? counted.format(value) : String(Number(value.toPrecision(4)));
}

/** A value with its 95% interval, to two figures of that. */
export function within(value, stderr) {
  const half = 1.96 * stderr;
  if (!Number.isFinite(value) || value === null || !Number.isFinite(stderr) || !(half > 0)) return number(value);
  const places = 1 - Math.floor(Math.log10(half));
  if (places > 5 || Math.abs(value) >= 1e6) return `${number(value)} ± ${number(half)}`;
  return `${value.toFixed(Math.max(0, places))} ± ${half.toFixed(Math.max(0, places))}`;
}

/** A length of time in seconds. */
export function lasting(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86_400).toFixed(1)} d`;
}

/** How long ago an ISO time was. */
export function ago(time) {
  return time === null ? "–" : `${lasting(Math.max(0, (Date.now() - Date.parse(time)) / 1000))} ago`;
}

/** `prefix_matching` as words. */
export const spoken = (name) => name.replaceAll("_", " ");

const SHORT = { layer: "layer ", head: "head ", neuron: "neuron ", k: "k = " };

/** What a series is about: head 1.3, or its dimensions one after the other. */
export function named(dims) {
  const left = { ...dims };
  const words = [];
  if ("source_layer" in left) {
    const ends = [`${left.source_layer}.${left.source_head}`, `${left.target_layer}.${left.target_head}`];
    words.push(left.target_layer < 0 ? ends[0] : ends.join(" → "));
    for (const end of ["source", "target"]) for (const part of ["layer", "head"]) delete left[`${end}_${part}`];
  }
  if ("layer" in left && "head" in left && left.layer >= 0 && left.head >= 0) {
    words.push(`${left.layer}.${left.head}`);
    delete left.layer;
    delete left.head;
  }
  for (const [name, value] of Object.entries(left)) {
    if (value === null || value === "") continue;
    if (name === "layer" && value === -1) words.push("embedding");
    else if (typeof value === "number" && value < 0) continue;
    else words.push(`${SHORT[name] ?? ""}${typeof value === "string" ? spoken(value) : value}`);
  }
  return words.join(" ");
}

/** Rows as CSV (RFC 4180). */
export function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** Hands a text to the reader as a file. */
export function save(name, text, type = "text/csv") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
