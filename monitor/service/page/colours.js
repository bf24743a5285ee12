// Colours. A layer has the same one in every chart; that of the page comes from the style sheet, so
// that both schemes have their own.

// Viridis (Smith, van der Walt; public domain): equal steps look equal, in grey and to the colour
// blind too. 25 stops, between which is interpolated.
const STOPS = "440154471063481f70472d7b4439834046883b528b365d8d31688e2c728e287c8e24868e21918c1f9a8a20a48628ae8035b77948c16e5ec96275d05490d743addc30c8e020e5e419fde725"
  .match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const DISTINCT = 8;

/** The colour at `share` (0 to 1) of the scale, as [red, green, blue]. */
export function viridis(share) {
  const place = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((from, at) => Math.round(from + (STOPS[low + 1][at] - from) * (place - low)));
}

/** A colour of the style sheet, by the name of its property. */
export function styled(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Whether the page is dark, as the reader chose or else the system says. */
export function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/**
 * The colour of a layer, of a model with so many; -1 is what enters the first. More than a few
 * layers are a scale, in which neighbours are alike.
 */
export function ofLayer(layer, layers) {
  if (layer < 0) return styled("--quiet");
  if (layers <= DISTINCT) return styled(`--hue-${layer}`);
  const share = layer / (layers - 1);
  return `rgb(${viridis(dark() ? 0.3 + 0.7 * share : 0.85 * share).join(" ")})`;
}

/** The colour of the n-th of what has no layer. */
export const ofNumber = (n) => styled(`--hue-${n % DISTINCT}`);
