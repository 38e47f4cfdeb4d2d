/** One choice of a few, as a radio group: arrows move, one tab stop. */

import { h } from "./dom";

export interface Segments {
  element: HTMLElement;
  show(options: readonly string[], chosen: string, disabled?: boolean): void;
}

export function segments(label: string, choose: (value: string) => void): Segments {
  const element = h("div", { class: "wb-segments", role: "radiogroup", "aria-label": label });
  const buttons = (): HTMLButtonElement[] => [...element.querySelectorAll("button")];

  element.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const all = buttons();
    const here = all.findIndex((button) => button.getAttribute("aria-checked") === "true");
    const next = all[(here + move + all.length) % all.length];
    next?.click();
    buttons().find((button) => button.value === next?.value)?.focus();
  });

  function show(options: readonly string[], chosen: string, disabled = false): void {
    const old = buttons();
    const same = old.length === options.length && old.every((button, i) => button.value === options[i]);
    if (!same) {
      element.replaceChildren(...options.map((value) => segment(value, () => choose(value))));
    }
    for (const button of buttons()) {
      const checked = button.value === chosen;
      button.setAttribute("aria-checked", String(checked));
      button.tabIndex = checked || (!options.includes(chosen) && button.value === options[0]) ? 0 : -1;
      button.disabled = disabled;
    }
  }
  return { element, show };
}

function segment(value: string, onClick: () => void): HTMLButtonElement {
  const button = h("button", { type: "button", class: "wb-segment", role: "radio", value }, value);
  button.addEventListener("click", onClick);
  return button;
}
