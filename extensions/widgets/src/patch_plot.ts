/** The plot itself: cells on a canvas, names and steps beside it, a pointer and a keyboard cursor. */

import { h, setText } from "./lib/dom";
import { type Geometry, drawCells, type Ink, outline, type Scale } from "./patch_grid";
import { shorten } from "./patch_sites";
import type { Cell } from "./patch_state";
import { windowSteps } from "./patch_window";

const LEAST_HEIGHT = 20;
const MOST_HEIGHT = 32;
/** Axis and padding: what of the plot's height is not cells. */
const NOT_CELLS = 36;
const SPINNER = 14;

export interface Drawing {
  values: Float32Array;
  scale: Scale;
  window: string;
  selected: Cell | null;
  busy: Cell | null;
}

export interface PlotEvents {
  /** The cell pointed at, or reached by keys, changed. */
  move(at: Cell | null, pointer: MouseEvent | null): void;
  pick(cell: Cell): void;
}

export class Plot {
  private readonly canvas = h("canvas", { class: "map-canvas" });
  private readonly spinner = h("div", { class: "map-spin wb-spin", hidden: true });
  private readonly axis = h("div", { class: "map-axis", "aria-hidden": "true" });
  private readonly names = h("div", { class: "map-sites", "aria-hidden": "true" });
  private readonly probe = h("i", { class: "map-probe" });
  readonly grid = h("div", { class: "map-grid", tabindex: "0", role: "application", "aria-roledescription": "heat map" }, this.canvas, this.spinner);
  readonly element = h("div", { class: "map-scroll" },
    h("div", { class: "map-plot" },
      h("div", { class: "map-corner wb-muted", "aria-hidden": "true" }, "layer ↓ step →"), this.axis, this.names, this.grid),
    this.probe);
  private rows = 0;
  private columns = 0;
  private hover: Cell | null = null;
  private cursor: Cell = [0, 0];
  private focused = false;

  constructor(private readonly events: PlotEvents) {
    this.listenToPointer();
    this.listenToKeys();
  }

  /** The cell that the reader is at, by pointer or by keys. */
  get at(): Cell | null {
    return this.hover ?? (this.focused ? this.cursor : null);
  }

  shape(sites: readonly string[], columns: number): void {
    const short = shorten(sites);
    this.rows = sites.length;
    this.columns = columns;
    this.names.replaceChildren(...sites.map((site, i) => h("div", { class: "map-site wb-mono", title: site }, h("bdi", {}, short[i]!))));
    this.axis.replaceChildren(...Array.from({ length: columns }, () => h("span")));
    this.cursor = this.inside(this.cursor);
    this.leave();
  }

  startFrom(cell: Cell): void {
    this.cursor = cell;
  }

  draw({ values, scale, window, selected, busy }: Drawing): void {
    const g = this.geometry();
    const ink = this.ink();
    const at = this.at;
    this.names.style.setProperty("--cell", `${g.cellHeight}px`);
    this.canvas.style.width = `${g.columns * g.cellWidth}px`;
    this.canvas.style.height = `${g.rows * g.cellHeight}px`;
    const context = drawCells(this.canvas, g, values, scale, ink);
    if (selected) outline(context, g, selected[0], ...windowSteps("1", selected[1], g.columns), ink.accent, ink.ground);
    if (at) outline(context, g, at[0], ...windowSteps(window, at[1], g.columns), ink.strong, ink.ground);
    this.drawAxis(g, at ? windowSteps(window, at[1], g.columns) : [0, 0]);
    const row = (at ?? selected)?.[0];
    [...this.names.children].forEach((name, i) => name.classList.toggle("on", i === row));
    this.placeSpinner(g, busy);
  }

  private geometry(): Geometry {
    const wide = Math.floor(this.grid.clientWidth / Math.max(1, this.columns));
    const tall = Math.floor((this.element.clientHeight - NOT_CELLS) / Math.max(1, this.rows));
    return {
      rows: this.rows,
      columns: this.columns,
      cellWidth: Math.max(8, Math.min(40, wide)),
      cellHeight: Math.max(LEAST_HEIGHT, Math.min(MOST_HEIGHT, tall)),
    };
  }

  /** The theme's colours as the canvas needs them: resolved. */
  private ink(): Ink {
    const style = getComputedStyle(this.probe);
    return { accent: style.color, hatch: style.borderTopColor, ground: style.backgroundColor, strong: style.outlineColor };
  }

  private drawAxis(g: Geometry, [first, end]: [number, number]): void {
    const every = g.cellWidth >= 20 ? 1 : g.cellWidth >= 12 ? 2 : 5;
    [...this.axis.children].forEach((tick, i) => {
      (tick as HTMLElement).style.width = `${g.cellWidth}px`;
      tick.classList.toggle("on", i >= first && i < end);
      setText(tick, i % every === 0 ? String(i) : "");
    });
  }

  private placeSpinner(g: Geometry, busy: Cell | null): void {
    this.spinner.hidden = busy === null;
    if (!busy) return;
    this.spinner.style.left = `${(busy[1] + 0.5) * g.cellWidth - SPINNER / 2}px`;
    this.spinner.style.top = `${(busy[0] + 0.5) * g.cellHeight - SPINNER / 2}px`;
  }

  private cellUnder(event: MouseEvent): Cell | null {
    const g = this.geometry();
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / g.cellWidth);
    const row = Math.floor((event.clientY - box.top) / g.cellHeight);
    return row >= 0 && row < g.rows && column >= 0 && column < g.columns ? [row, column] : null;
  }

  private listenToPointer(): void {
    this.grid.addEventListener("mousemove", (event) => {
      this.hover = this.cellUnder(event);
      this.events.move(this.at, event);
    });
    this.grid.addEventListener("mouseleave", () => this.leave());
    this.grid.addEventListener("click", (event) => {
      const cell = this.cellUnder(event);
      if (cell) this.pick(cell);
    });
  }

  private listenToKeys(): void {
    this.grid.addEventListener("focus", () => {
      this.focused = this.grid.matches(":focus-visible");
      this.events.move(this.at, null);
    });
    this.grid.addEventListener("blur", () => {
      this.focused = false;
      this.events.move(this.at, null);
    });
    this.grid.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const to = this.reached(event.key);
      if (to) this.cursor = to;
      else if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.focused = true;
      this.leave();
      if (!to) this.pick(this.cursor);
    });
  }

  private leave(): void {
    this.hover = null;
    this.events.move(this.at, null);
  }

  private pick(cell: Cell): void {
    this.cursor = cell;
    this.events.pick(cell);
  }

  /** Where a key leads from the cursor, kept inside. */
  private reached(key: string): Cell | null {
    const [row, column] = this.cursor;
    const moves: Record<string, Cell> = {
      ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1], ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
      Home: [row, 0], End: [row, this.columns - 1], PageUp: [0, column], PageDown: [this.rows - 1, column],
    };
    const to = moves[key];
    return to ? this.inside(to) : null;
  }

  private inside([row, column]: Cell): Cell {
    return [clamp(row, this.rows), clamp(column, this.columns)];
  }
}

function clamp(index: number, length: number): number {
  return Math.max(0, Math.min(length - 1, index));
}
