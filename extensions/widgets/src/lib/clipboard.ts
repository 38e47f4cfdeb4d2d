/** Copying, also where the page is served over plain http and has no clipboard API. */

import { glyph, iconButton } from "./dom";

export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text: string): boolean {
  const before = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  area.style.cssText = "position:fixed;opacity:0";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (before instanceof HTMLElement) before.focus();
  return done;
}

/** A button that copies what `text` returns and shows a tick for a moment. */
export function copyButton(label: string, text: () => string, announce: (said: string) => void): HTMLButtonElement {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const button = iconButton("copy", label, () => {
    void copyText(text()).then((done) => {
      announce(done ? "copied" : "the browser refused to copy");
      button.replaceChildren(glyph(done ? "check" : "close"));
      button.dataset["state"] = done ? "copied" : "refused";
      clearTimeout(timer);
      timer = setTimeout(() => {
        button.replaceChildren(glyph("copy"));
        delete button.dataset["state"];
      }, 1200);
    });
  });
  return button;
}
