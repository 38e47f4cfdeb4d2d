/** The figures of a scrubber: one canvas a lane, with the attention laid over one of them. */

import { drawPicture, fit } from "./lib/canvas";
import { type Table, table } from "./lib/colour";
import { h, setAttributes } from "./lib/dom";
import { frameBytes, type Frames, type Lane } from "./scrubber_frames";
import { type Maps, paint, type Place } from "./scrubber_maps";

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
  /** The lane whose places can be asked what they attend to, or null. */
  asked: number | null;
  place: Place | null;
}

/** Told that a place was pointed at, or that the pointer was moved by so many cells. */
export interface Pointing {
  at(place: Place): void;
  move(right: number, down: number): void;
}

const MOVES: Record<string, [number, number]> = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

class Figure {
  private readonly canvas = h("canvas", { class: "wb-crisp", role: "img" });
  private readonly mark = h("i", { class: "scrub-mark", hidden: true });
  private readonly frame = h("div", { class: "scrub-frame wb-void" }, this.canvas, this.mark);
  readonly element: HTMLElement;

  constructor(readonly label: string, pointing: Pointing) {
    this.frame.addEventListener("click", (event) => {
      const box = this.frame.getBoundingClientRect();
      if (this.asked) pointing.at({ x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
    });
    this.frame.addEventListener("keydown", (event) => {
      const move = event.altKey ? MOVES[event.key] : undefined;
      if (!this.asked || (!move && event.key !== "Enter")) return;
      event.preventDefault();
      event.stopPropagation();
      if (move) pointing.move(...move);
      else pointing.at({ x: 0.5, y: 0.5 });
    });
    this.element = h("figure", { class: "scrub-lane" }, h("figcaption", { class: "wb-clip", title: label }, label), this.frame);
  }

  private get asked(): boolean {
    return this.frame.hasAttribute("tabindex");
  }

  /** Shows whether the lane's places can be asked, and the one that is. */
  point(asked: boolean, place: Place | null): void {
    setAttributes(this.frame, {
      tabindex: asked ? 0 : null,
      title: asked ? "click a place to see which words it attends to; Alt and the arrow keys move it" : null,
    });
    this.mark.hidden = !asked || !place;
    if (place) this.mark.style.cssText = `left:${100 * place.x}%;top:${100 * place.y}%`;
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

  constructor(private readonly frames: Frames, private readonly pointing: Pointing) {}

  show(lanes: readonly Lane[]): void {
    this.lanes = lanes;
    const labels = lanes.map((lane) => lane.label);
    // The figures stay where only their frames are new, so that nothing blinks between runs.
    if (JSON.stringify(labels) !== JSON.stringify(this.figures.map((figure) => figure.label))) {
      this.figures = labels.map((label) => new Figure(label, this.pointing));
      this.element.replaceChildren(...this.figures.map((figure) => figure.element));
    }
    this.element.style.setProperty("--lanes", String(Math.max(1, lanes.length)));
  }

  draw(view: View): void {
    this.figures.forEach((figure, i) => {
      const picture = this.frames.get(frameBytes(this.lanes[i]!, view.kind, view.step));
      const { overlay } = view;
      const mine = overlay && overlay.maps.lane === i ? overlay : null;
      figure.point(view.asked === i, view.place);
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
