/** Word chips: click one to lay its attention over the image, shift-click to add more. */

import { h } from "./lib/dom";
import type { Token } from "./scrubber_maps";

export interface Words {
  element: HTMLElement;
  show(tokens: readonly Token[], chosen: readonly number[], live: boolean): void;
  /** Shows on each chip its share of the largest weight; null takes them away. */
  weigh(tokens: readonly Token[], weights: readonly number[] | null): void;
}

export function words(choose: (tokens: number[]) => void): Words {
  const plain = h("div", { class: "words-row" });
  const special = h("div", { class: "words-row words-special" });
  const element = h("div", { class: "words", role: "group", "aria-label": "Words of the prompt" },
    h("span", { class: "wb-muted words-label" }, "words"), plain, special);
  let drawn = "";
  let selected: readonly number[] = [];

  function press(token: Token, adding: boolean): void {
    const on = selected.includes(token.index);
    if (adding) choose(on ? selected.filter((index) => index !== token.index) : [...selected, token.index]);
    else choose(on && selected.length === 1 ? [] : [token.index]);
  }

  function chip(token: Token): HTMLButtonElement {
    const text = token.text.replace(/<\/w>$/, "").replace(/^[▁Ġ]/, "").trim() || "␣";
    const button = h("button", { type: "button", class: "word", "data-index": token.index, title: `token ${token.index}; shift-click adds it to the others` }, text);
    button.addEventListener("click", (event) => press(token, event.shiftKey));
    return button;
  }

  function show(tokens: readonly Token[], chosen: readonly number[], live: boolean): void {
    selected = chosen;
    const key = JSON.stringify(tokens);
    if (key !== drawn) {
      drawn = key;
      const apart = foldPadding(tokens.filter((token) => token.special));
      plain.replaceChildren(...tokens.filter((token) => !token.special).map(chip));
      special.replaceChildren(...apart.shown.map(chip));
      if (apart.more) special.append(h("span", { class: "words-more" }, `+${apart.more} padding`));
      special.hidden = apart.shown.length === 0;
    }
    element.hidden = tokens.length === 0;
    for (const button of element.querySelectorAll<HTMLButtonElement>(".word")) {
      button.setAttribute("aria-pressed", String(chosen.includes(Number(button.dataset["index"]))));
      button.disabled = !live;
    }
  }

  function weigh(tokens: readonly Token[], weights: readonly number[] | null): void {
    const most = Math.max(...(weights ?? []), 0);
    const shares = new Map(tokens.map((token, i) => [token.index, weights && most > 0 ? weights[i]! / most : 0]));
    for (const button of element.querySelectorAll<HTMLButtonElement>(".word")) {
      button.style.setProperty("--share", String(shares.get(Number(button.dataset["index"])) ?? 0));
    }
  }
  return { element, show, weigh };
}

/** A long tail of padding is a count, not sixty chips. */
function foldPadding(tokens: readonly Token[]): { shown: Token[]; more: number } {
  const most = 4;
  return { shown: tokens.slice(0, most), more: Math.max(0, tokens.length - most) };
}
