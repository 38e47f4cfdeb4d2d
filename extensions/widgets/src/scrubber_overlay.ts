/** The row under the words: which layer, how strong, and what the colours mean. */

import { gradient, table } from "./lib/colour";
import { h, setText } from "./lib/dom";
import { significant } from "./lib/format";

const FIRST_BLEND = 65;

export class OverlayRow {
  private readonly layers = h("select", { class: "wb-select", "aria-label": "Attention layer" });
  private readonly range = h("input", { class: "wb-range", type: "range", min: 0, max: 100, value: FIRST_BLEND, "aria-label": "Overlay strength" });
  private readonly strength = h("label", { class: "scrub-blend" }, h("span", { class: "wb-muted scrub-word" }, "blend"), this.range);
  private readonly top = h("span");
  private readonly legend = h("div", { class: "scrub-legend" },
    h("span", { class: "wb-muted scrub-word" }, "attention"), h("span", {}, "0"),
    h("div", { class: "scrub-ramp", style: `background:${gradient(table("viridis"))}` }), this.top);
  private readonly hint = h("span", { class: "wb-muted" });
  readonly element = h("div", { class: "scrub-overlay" }, this.layers, this.strength, this.legend, this.hint);
  private drawn = "";

  constructor(chooseLayer: (layer: number) => void, blendChanged: () => void) {
    this.layers.addEventListener("change", () => chooseLayer(Number(this.layers.value)));
    this.range.addEventListener("input", blendChanged);
  }

  get blend(): number {
    return Number(this.range.value) / 100;
  }

  /** What to say while there is nothing to blend, or of the place that was pointed at. */
  say(text: string): void {
    setText(this.hint, text);
  }

  /** `top` is the value at the end of the colours, or null while no word is chosen. */
  show(layers: readonly string[], layer: number, top: number | null): void {
    if (this.drawn !== JSON.stringify(layers)) {
      this.drawn = JSON.stringify(layers);
      this.layers.replaceChildren(...layers.map((name, i) => h("option", { value: i }, name)));
    }
    this.layers.value = String(Math.min(layer, layers.length - 1));
    this.layers.hidden = layers.length === 0;
    this.legend.hidden = this.strength.hidden = top === null;
    if (top !== null) setText(this.top, significant(top));
  }
}
