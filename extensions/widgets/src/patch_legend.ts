/** The colour scale with its ends, and the noise floor marked on it. */

import { gradient } from "./lib/colour";
import { h, setText } from "./lib/dom";
import { significant } from "./lib/format";
import { position, type Scale } from "./patch_grid";

export class Legend {
  private readonly low = h("span");
  private readonly high = h("span");
  private readonly tick = h("i", { class: "map-tick" });
  private readonly mirror = h("i", { class: "map-tick" });
  private readonly ramp = h("div", { class: "map-ramp" }, this.tick, this.mirror);
  private readonly floor = h("span", { class: "wb-muted" });
  readonly element = h("div", { class: "wb-end map-legend" }, this.low, this.ramp, this.high, this.floor);

  show(scale: Scale, floor: number | null | undefined): void {
    this.ramp.style.backgroundImage = gradient(scale.colours);
    setText(this.low, scale.signed ? `−${significant(scale.limit)}` : "0");
    setText(this.high, significant(scale.limit));
    const known = floor !== null && floor !== undefined;
    setText(this.floor, known ? `noise floor ${scale.signed ? "±" : ""}${significant(floor)}` : "");
    this.tick.hidden = !known;
    this.mirror.hidden = !known || !scale.signed;
    this.tick.style.left = `${100 * position(floor ?? 0, scale)}%`;
    this.mirror.style.left = `${100 * position(-(floor ?? 0), scale)}%`;
  }
}
