// Building elements. Text is only ever set as text: what runs and concepts are called is never markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. Attributes that are null, undefined or false are left out; `on…` are listeners.
 * @param {string} tag
 * @param {Object} [attributes]
 * @param {...(Node|string|number|null|undefined|Array)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. @returns {SVGElement} */
export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined);
}

/** Puts other children into an element. What had the focus has it again, where it is there. */
export function refill(element, ...children) {
  const path = pathOf(document.activeElement, element);
  element.replaceChildren(...nodes(children));
  if (path !== null) {
    const now = path.reduce((at, [index]) => at?.children[index], element);
    if (now?.tagName === path.at(-1)[1]) now.focus({ preventScroll: true });
  }
  return element;
}

/** How to come from an element to one within it: which child, and its tag, at every level. */
function pathOf(inner, element) {
  if (inner === null || inner === element || !element.contains(inner)) return null;
  const path = [];
  for (let at = inner; at !== element; at = at.parentElement) {
    path.unshift([[...at.parentElement.children].indexOf(at), at.tagName]);
  }
  return path;
}

let count = 0;
/** An id that no other element has. */
export function unique(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** A labelled choice. `options` are values, or pairs of a value and its name. */
export function choice(label, options, chosen, onchange) {
  const select = h("select", { onchange: () => onchange(select.value) });
  for (const option of options) {
    const [value, name] = Array.isArray(option) ? option : [option, option];
    select.append(h("option", { value, selected: String(value) === String(chosen) }, name));
  }
  return h("label", { class: "choice" }, h("span", null, label), select);
}

/** A few exclusive buttons, one of which is pressed. */
export function switches(label, options, chosen, onchange) {
  const buttons = options.map(([value, name]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), "data-value": value,
      onclick: () => {
        for (const one of buttons) one.setAttribute("aria-pressed", String(one.dataset.value === value));
        onchange(value);
      } }, name));
  return h("div", { class: "switches", role: "group", "aria-label": label },
    h("span", { "aria-hidden": "true" }, label), buttons);
}

/** A table of words and numbers; `columns` are pairs of a heading and a function of the row. */
export function table(caption, columns, rows) {
  const cells = (row) => columns.map(([, cell], at) =>
    at === 0 ? h("th", { scope: "row" }, cell(row)) : h("td", null, cell(row)));
  return h("div", { class: "scrolled", tabindex: "0", role: "group", "aria-label": caption },
    h("table", null, h("caption", { class: "unseen" }, caption),
      h("thead", null, h("tr", null, columns.map(([name]) => h("th", { scope: "col" }, name)))),
      h("tbody", null, rows.map((row) => h("tr", null, cells(row))))));
}

/** Says something to those who listen to the page. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** Why there is nothing to see. */
export function refusal(error) {
  return h("div", { class: "nothing" }, h("p", null, error.message),
    error.expected ? h("p", null, `Expected: ${error.expected}`) : null,
    error.advice ? h("p", null, `What to do: ${error.advice}`) : null);
}
