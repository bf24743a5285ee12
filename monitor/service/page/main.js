// The page: which view the address names, the colour scheme, and whether the service is there.

import { dark } from "./colours.js";
import { about, follow, live } from "./data.js";
import { h, refill, refusal } from "./dom.js";
import { read, written } from "./place.js";
import { RunList } from "./runs.js";
import { RunPage } from "./run.js";

const REST_MS = 1_000;
// That a run has stalled is not an event.
const LOOK_MS = 30_000;
const holder = document.getElementById("main");
let view = null;
let place = null;

function keep(now) {
  history.replaceState(null, "", written(now));
}

function go(to) {
  location.hash = written(to);
}

async function show() {
  // Links within the page are no places.
  if (location.hash && !location.hash.startsWith("#/")) return;
  view?.close();
  place = read(location.hash);
  // A place of its own: what was left while it was still asking draws where nobody sees it.
  const ground = h("div");
  refill(holder, ground);
  const mine = place.run.length === 0
    ? new RunList(ground, (run) => go({ ...place, run }))
    : new RunPage(ground, place, keep, go);
  view = mine;
  document.title = place.run.length ? `${place.run.join(", ")} – phasewatch` : "phasewatch";
  try {
    await mine.open();
  } catch (error) {
    if (view === mine) {
      refill(ground, refusal(error), h("p", null, h("a", { href: "#/" }, "All runs")));
      view = null;
    }
    if (error.status === undefined) throw error;
  }
}

let due = null;
/** At most one update a second, however much is measured. */
function changed(event) {
  if (place?.run.length && event.run !== undefined && !place.run.includes(event.run)) return;
  due ??= setTimeout(async () => {
    try {
      await view?.update();
    } catch (error) {
      if (error.status === undefined) throw error;
    } finally {
      due = null;
    }
  }, REST_MS);
}

let lost = false;
function connected(there) {
  const line = document.getElementById("connection");
  line.textContent = there ? "live" : "disconnected, retrying";
  line.className = there ? "live" : "lost";
  // What happened meanwhile was not told.
  if (there && lost) {
    if (view === null) show();
    else changed({});
  }
  lost = !there;
}

function schemes() {
  const button = document.getElementById("theme");
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  const stored = () => {
    try {
      return localStorage.getItem("phasewatch-theme");
    } catch {
      return null;
    }
  };
  const set = (theme) => {
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
    name();
    view?.restyle();
  };
  button.setAttribute("aria-label", "Switch between the dark and the light scheme");
  button.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("phasewatch-theme", theme);
    } catch {
      // Where nothing may be stored it holds for this visit.
    }
    set(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => set(stored()));
  set(stored());
}

schemes();
addEventListener("hashchange", show);
if (!live) {
  document.getElementById("connection").textContent = about.made;
  // A report of one run opens on it.
  if (!location.hash && about.runs.length === 1) {
    history.replaceState(null, "", written({ ...read(""), run: about.runs }));
  }
}
follow(changed, connected);
if (live) setInterval(() => changed({}), LOOK_MS);
show();
