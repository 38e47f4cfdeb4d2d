/** The figures of a scrubber: one canvas a lane, with the attention laid over one of them. */

import { drawPicture, fit } from "./lib/canvas";
import { type Table, table } from "./lib/colour";
import { h } from "./lib/dom";
import { frameBytes, type Frames, type Lane } from "./scrubber_frames";
import { type Maps, paint } from "./scrubber_maps";

export interface Overlay {
  maps: Maps;
  layer: number;
  tokens: readonly number[];
  /** 0 shows the image alone, 1 the map alone. */
  blend: number;
}

export interface View {
  kind: string;
  step: number;
  text: string;
  overlay: Overlay | null;
}

class Figure {
  private readonly canvas = h("canvas", { class: "wb-crisp", role: "img" });
  private readonly frame = h("div", { class: "scrub-frame wb-void" }, this.canvas);
  readonly element: HTMLElement;

  constructor(readonly label: string) {
    this.element = h("figure", { class: "scrub-lane" }, h("figcaption", { class: "wb-clip", title: label }, label), this.frame);
  }

  draw(picture: ReturnType<Frames["get"]>, view: View, laid: ((context: CanvasRenderingContext2D) => void) | null): void {
    const bitmap = picture instanceof ImageBitmap ? picture : null;
    this.frame.dataset["state"] = bitmap ? "shown" : ((picture as string | null) ?? "none");
    // While the next frame is being decoded the one before stays: a flash of emptiness is worse.
    if (picture === "pending") return;
    const width = this.frame.clientWidth;
    if (bitmap) this.frame.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
    const context = fit(this.canvas, width, bitmap ? (width * bitmap.height) / bitmap.width : width);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (bitmap) {
      drawPicture(context, bitmap);
      laid?.(context);
    }
    this.canvas.setAttribute("aria-label", `${this.label}, ${view.kind}, ${view.text}`);
  }
}

export class Stage {
  readonly element = h("div", { class: "scrub-stage" });
  private figures: Figure[] = [];
  private lanes: readonly Lane[] = [];
  private readonly colours: Table = table("viridis");
  private readonly scratch = document.createElement("canvas");

  constructor(private readonly frames: Frames) {}

  show(lanes: readonly Lane[]): void {
    this.lanes = lanes;
    const labels = lanes.map((lane) => lane.label);
    // The figures stay where only their frames are new, so that nothing blinks between runs.
    if (JSON.stringify(labels) !== JSON.stringify(this.figures.map((figure) => figure.label))) {
      this.figures = labels.map((label) => new Figure(label));
      this.element.replaceChildren(...this.figures.map((figure) => figure.element));
    }
    this.element.style.setProperty("--lanes", String(Math.max(1, lanes.length)));
  }

  draw(view: View): void {
    this.figures.forEach((figure, i) => {
      const picture = this.frames.get(frameBytes(this.lanes[i]!, view.kind, view.step));
      const { overlay } = view;
      const mine = overlay && overlay.maps.lane === i ? overlay : null;
      figure.draw(picture, view, mine && ((context) => this.lay(context, mine, view.step)));
    });
  }

  private lay(context: CanvasRenderingContext2D, { maps, layer, tokens, blend }: Overlay, step: number): void {
    paint(maps.field(layer, step, tokens), maps.top(layer, tokens), this.colours, this.scratch);
    context.save();
    context.globalAlpha = blend;
    drawPicture(context, this.scratch);
    context.restore();
  }
}
