/** ImageStrip: the images that matter, side by side, each a click from full size. */

import { type Bytes, decode } from "./lib/canvas";
import { empty, h, iconButton, setText } from "./lib/dom";
import { type ElementState, type Panel, widget } from "./lib/panel";
import css from "./images.css";

interface Card {
  label: string;
  png?: Bytes;
  caption?: string;
  badge?: string;
}

interface State extends ElementState {
  cards: Card[];
  note: string;
}

function build(panel: Panel<State>): void {
  const { root, model } = panel;
  const strip = h("div", { class: "strip" });
  const nothing = empty("No images yet", "Run to see the source and the target.");
  const note = h("p", { class: "strip-note" });
  const zoom = zoomDialog();
  root.append(h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Images")), nothing, strip, note, zoom.element);

  let drawing = 0;
  async function drawCards(): Promise<void> {
    const mine = ++drawing;
    const cards = model.get("cards") ?? [];
    const pictures = await Promise.all(cards.map((card) => picture(card)));
    if (mine !== drawing) return;
    nothing.hidden = cards.length > 0;
    strip.hidden = cards.length === 0;
    strip.replaceChildren(...cards.map((card, i) => cardElement(card, pictures[i]!, () => zoom.open(cards, pictures, i))));
  }

  panel.watch(["cards"], () => void drawCards());
  panel.watch(["note"], () => {
    setText(note, model.get("note") ?? "");
    note.hidden = !model.get("note");
  });
}

type Picture = HTMLCanvasElement | "none" | "unreadable";

async function picture(card: Card): Promise<Picture> {
  try {
    const bitmap = await decode(card.png);
    return bitmap ? canvasOf(bitmap) : "none";
  } catch {
    return "unreadable";
  }
}

function canvasOf(bitmap: CanvasImageSource & { width: number; height: number }): HTMLCanvasElement {
  const canvas = h("canvas", { width: bitmap.width, height: bitmap.height, class: bitmap.width <= 256 ? "wb-crisp" : "" });
  canvas.getContext("2d")!.drawImage(bitmap, 0, 0);
  return canvas;
}

function cardElement(card: Card, shown: Picture, onZoom: () => void): HTMLElement {
  const place = shown instanceof HTMLCanvasElement ? zoomable(card, shown, onZoom) : hole(shown);
  if (card.badge) place.append(h("span", { class: "card-badge" }, card.badge));
  return h("figure", { class: "card" },
    h("figcaption", { class: "card-label wb-clip", title: card.label }, card.label), place,
    card.caption ? h("p", { class: "card-caption wb-muted", title: card.caption }, card.caption) : null);
}

function zoomable(card: Card, canvas: HTMLCanvasElement, onZoom: () => void): HTMLElement {
  const button = h("button", { type: "button", class: "card-image", "aria-label": `Enlarge ${card.label}` }, canvas);
  button.addEventListener("click", onZoom);
  return button;
}

function hole(state: "none" | "unreadable"): HTMLElement {
  return h("div", { class: "card-image card-hole wb-void" }, h("span", {}, state === "none" ? "not yet" : "unreadable"));
}

interface Zoom {
  element: HTMLDialogElement;
  open(cards: Card[], pictures: Picture[], at: number): void;
}

function zoomDialog(): Zoom {
  const title = h("span", { class: "wb-title" });
  const size = h("span", { class: "wb-muted" });
  const place = h("div", { class: "zoom-place" });
  const element = h("dialog", { class: "zoom", "aria-label": "Enlarged image" });
  element.append(h("header", { class: "zoom-head" }, title, size, h("div", { class: "wb-end" }, iconButton("close", "Close", () => element.close()))), place);
  let list: { card: Card; picture: HTMLCanvasElement }[] = [];
  let here = 0;

  function show(): void {
    const item = list[here];
    if (!item) return;
    const { width, height } = item.picture;
    const room = Math.min(innerWidth * 0.8, 768) / width;
    const scale = Math.min(room, (innerHeight * 0.75) / height);
    const factor = scale >= 1 ? Math.floor(scale) : scale;
    const copy = canvasOf(item.picture);
    copy.style.width = `${width * factor}px`;
    copy.style.height = `${height * factor}px`;
    setText(title, item.card.label);
    setText(size, `${width} × ${height}${factor > 1 ? ` · ${factor}×` : ""}`);
    place.replaceChildren(copy);
  }
  element.addEventListener("click", (event) => {
    if (event.target === element) element.close();
  });
  element.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || list.length === 0) return;
    here = (here + move + list.length) % list.length;
    show();
  });

  function open(cards: Card[], pictures: Picture[], at: number): void {
    list = cards.flatMap((card, i) => {
      const picture = pictures[i];
      return picture instanceof HTMLCanvasElement ? [{ card, picture }] : [];
    });
    here = Math.max(0, list.findIndex((item) => item.card === cards[at]));
    show();
    element.showModal();
  }
  return { element, open };
}

export default widget<State>("images", "Images", css, build);
