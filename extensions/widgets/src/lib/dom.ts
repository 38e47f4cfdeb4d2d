/** Small helpers that make elements. Text only ever becomes text nodes: prompts are hostile. */

export type Child = Node | string | null | undefined | false;
export type Attributes = Record<string, string | number | boolean | null | undefined>;

/** Makes an element; `false`, `null` and `undefined` attributes are left out, `true` ones are empty. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  setAttributes(element, attributes);
  for (const child of children) if (child) element.append(child);
  return element;
}

export function setAttributes(element: Element, attributes: Attributes): void {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** Sets text only where it differs, so that selections and live regions stay calm. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

const SVG = "http://www.w3.org/2000/svg";

export function s(tag: string, attributes: Attributes = {}, ...children: Element[]): SVGElement {
  const element = document.createElementNS(SVG, tag);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

/** Paths on a 16-unit grid; those with a `!` are filled. */
const GLYPHS = {
  play: "!M5 3.2v9.6l8-4.8z",
  pause: "!M4 3h3v10H4zM9 3h3v10H9z",
  previous: "M10 3.5 5.5 8l4.5 4.5",
  next: "M6 3.5 10.5 8 6 12.5",
  stop: "!M4 4h8v8H4z",
  copy: "M6 6V3.5h6.5V10H10M3.5 6H10v6.5H3.5z",
  check: "M3.5 8.5 6.5 11.5 12.5 4.5",
  close: "M4.5 4.5l7 7M11.5 4.5l-7 7",
  search: "M7 11.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM10.5 10.5 13.5 13.5",
  dice: "M3.5 3.5h9v9h-9zM6 6h.01M10 10h.01M10 6h.01M6 10h.01",
  down: "M4 6.5 8 10.5 12 6.5",
} as const;

export type GlyphName = keyof typeof GLYPHS;

export function glyph(name: GlyphName): SVGElement {
  const path = GLYPHS[name];
  const solid = path.startsWith("!");
  const shape = s("path", { d: solid ? path.slice(1) : path, class: solid ? "solid" : null });
  return s("svg", { class: "wb-glyph", viewBox: "0 0 16 16", "aria-hidden": "true" }, shape);
}

export function iconButton(name: GlyphName, label: string, onClick: () => void): HTMLButtonElement {
  const button = h("button", { type: "button", class: "wb-button wb-icon", "aria-label": label, title: label }, glyph(name));
  button.addEventListener("click", onClick);
  return button;
}

export function textButton(label: string, onClick: () => void, extra = ""): HTMLButtonElement {
  const button = h("button", { type: "button", class: `wb-button ${extra}` }, label);
  button.addEventListener("click", onClick);
  return button;
}

/** What an empty view says: one line of what is missing, one of what to do. */
export function empty(title: string, advice: string): HTMLElement {
  return h("div", { class: "wb-empty" }, h("b", {}, title), h("span", {}, advice));
}

let serial = 0;
/** An id that is unique in the page, for aria references. */
export function uniqueId(prefix: string): string {
  serial += 1;
  return `${prefix}-${Math.random().toString(36).slice(2, 8)}-${serial}`;
}
