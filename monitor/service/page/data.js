// The one way in which the page comes by what it shows. A report has its tables in itself; nothing else
// of the page knows which of the two it is in.

import { answering } from "./embedded.js";

/** Why there is no answer: what arrived, what was expected, what to do. */
export class Refusal extends Error {
  /** @param {{error: string, expected?: string, do?: string}} told @param {number} status */
  constructor(told, status) {
    super(told.error);
    this.expected = told.expected ?? "";
    this.advice = told.do ?? "";
    this.status = status;
  }
}

const element = document.getElementById("report");
const report = element === null ? null : await unpacked(element.textContent);
const embedded = report === null ? null : answering(report);

/** Whether a service answers; else this is a report. */
export const live = report === null;

/** What a report says of itself: its runs, and when and from what it was made. */
export const about = report?.about ?? null;

const RETRY_MS = 5_000;
const waiting = new Map();

/**
 * The canonical address of a question: parameters by name, those that are empty left out.
 * @param {string} path such as "/api/series"
 * @param {Object<string, string|number|Array|null|undefined>} [params]
 */
export function address(path, params = {}) {
  const query = new URLSearchParams();
  for (const name of Object.keys(params).sort()) {
    for (const value of [params[name]].flat()) {
      if (value !== null && value !== undefined && value !== "") query.append(name, value);
    }
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/**
 * What is answered to a question. The same one asked twice at once is asked once.
 * @throws {Refusal}
 */
export async function answer(path, params = {}) {
  if (!live) {
    const told = embedded(path, params);
    if (told !== null) return told;
    throw new Refusal({ error: "Not part of this report", do: "ask `phasewatch serve`" }, 404);
  }
  const at = address(path, params);
  if (!waiting.has(at)) {
    waiting.set(at, fetched(at).finally(() => waiting.delete(at)));
  }
  return waiting.get(at);
}

/** @param {string} text a gzip of JSON, as base64 */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function fetched(at) {
  let response;
  try {
    response = await fetch(`.${at}`, { headers: { Accept: "application/json" } });
  } catch {
    throw new Refusal({ error: "The service does not answer", do: "is it running?" }, 0);
  }
  const told = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Refusal(told, response.status);
  return told;
}

/**
 * Calls `changed` with each event of the service, and `connected` with whether it is there.
 * Nothing happens in a report.
 * @param {(event: {kind: string, run: string}) => void} changed
 * @param {(there: boolean) => void} connected
 */
export function follow(changed, connected) {
  if (!live) return;
  const source = new EventSource("./api/events");
  source.addEventListener("open", () => connected(true));
  source.addEventListener("error", () => {
    connected(false);
    // The browser gives up for good where it was refused, as by a proxy whose service is gone.
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(() => follow(changed, connected), RETRY_MS);
    }
  });
  for (const kind of ["measurement", "state"]) {
    source.addEventListener(kind, (event) => changed({ kind, ...JSON.parse(event.data) }));
  }
}
