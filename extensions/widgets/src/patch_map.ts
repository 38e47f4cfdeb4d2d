/** PatchMap: layer × step, each cell one patch; click to make it, hover to read it. */

import { bytes, type Bytes, onResize } from "./lib/canvas";
import { gradient, isDark, onTheme, table } from "./lib/colour";
import { empty, h, setText, textButton } from "./lib/dom";
import { significant } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { segments } from "./lib/segments";
import { perFrame } from "./lib/timing";
import { autoLimit, type Cell, drawCells, type Geometry, type Ink, outline, position, type Scale } from "./patch_grid";
import css from "./patch_map.css";
import { shorten } from "./patch_sites";
import { stepsText, WINDOWS, windowSteps } from "./patch_window";

interface State extends ElementState {
  sites: string[];
  steps: number;
  values: Bytes;
  metric: string;
  noise_floor: number | null;
  limit: number;
  signed: boolean;
  window: string;
  selected: number[];
  busy: number[];
  status: "idle" | "running";
  progress: { done?: number; of?: number };
  source_label: string;
  target_label: string;
}

const LEAST_HEIGHT = 20;
const MOST_HEIGHT = 32;
/** Axis and padding: what of the plot's height is not cells. */
const NOT_CELLS = 36;

function build(panel: Panel<State>): void {
  const { root, model, signal } = panel;
  let values = new Float32Array();
  let scale: Scale = { colours: table("viridis"), limit: 1, signed: false };
  let hover: Cell | null = null;
  let cursor: Cell = [0, 0];
  let focused = false;

  const labels = h("span", { class: "map-labels wb-muted wb-clip" });
  const windows = segments("Steps a patch covers", (value) => chooseWindow(value));
  const progress = h("span", { class: "wb-muted" });
  const fill = textButton("Fill all", () => model.send({ kind: "fill" }));
  const stop = textButton("Stop", () => model.send({ kind: "stop" }));
  const siteList = h("div", { class: "map-sites", "aria-hidden": "true" });
  const canvas = h("canvas", { class: "map-canvas" });
  const spinner = h("div", { class: "map-spin wb-spin", hidden: true });
  const grid = h("div", { class: "map-grid", tabindex: "0", role: "application", "aria-roledescription": "heat map" }, canvas, spinner);
  const axis = h("div", { class: "map-axis", "aria-hidden": "true" });
  const corner = h("div", { class: "map-corner wb-muted", "aria-hidden": "true" }, "layer ↓ step →");
  const plot = h("div", { class: "map-plot" }, corner, axis, siteList, grid);
  const tip = h("div", { class: "map-tip", role: "tooltip", hidden: true });
  const readout = h("span", { class: "map-readout wb-clip", "aria-live": "polite" });
  const low = h("span");
  const high = h("span");
  const floorTick = h("i", { class: "map-tick" });
  const floorText = h("span", { class: "wb-muted" });
  const mirrorTick = h("i", { class: "map-tick" });
  const ramp = h("div", { class: "map-ramp" }, floorTick, mirrorTick);
  const foot = h("footer", { class: "map-foot" }, readout, h("div", { class: "wb-end map-legend" }, low, ramp, high, floorText));
  const nothing = empty("No sites", "Load a model and run source and target to patch between them.");
  const scroll = h("div", { class: "map-scroll" }, plot);
  root.append(
    h("header", { class: "wb-head" },
      h("span", { class: "wb-title" }, "Patch map"), labels,
      h("div", { class: "wb-end" }, h("div", { class: "map-window" }, h("span", { class: "wb-muted" }, "steps"), windows.element), progress, fill, stop)),
    nothing, scroll, foot, tip,
  );

  const draw = perFrame(drawAll);

  function geometry(): Geometry {
    const columns = model.get("steps");
    const rows = model.get("sites").length;
    const wide = Math.floor(grid.clientWidth / Math.max(1, columns));
    const tall = Math.floor((scroll.clientHeight - NOT_CELLS) / Math.max(1, rows));
    return {
      rows,
      columns,
      cellWidth: Math.max(8, Math.min(40, wide)),
      cellHeight: Math.max(LEAST_HEIGHT, Math.min(MOST_HEIGHT, tall)),
    };
  }

  function scaleNow(): Scale {
    const signed = model.get("signed");
    const dark = isDark(root);
    const limit = model.get("limit") > 0 ? model.get("limit") : autoLimit(values, model.get("noise_floor"));
    return { signed, limit, colours: table(signed ? (dark ? "dark" : "light") : "viridis") };
  }

  function ink(): Ink {
    const style = getComputedStyle(probe);
    return { accent: style.color, line: style.borderTopColor, hatch: style.borderTopColor, ground: style.backgroundColor, strong: style.outlineColor };
  }
  const probe = h("i", { class: "map-probe" });
  root.append(probe);

  function drawAll(): void {
    const g = geometry();
    const pens = ink();
    siteList.style.setProperty("--cell", `${g.cellHeight}px`);
    const context = drawCells(canvas, g, values, scale, pens);
    canvas.style.width = `${g.columns * g.cellWidth}px`;
    canvas.style.height = `${g.rows * g.cellHeight}px`;
    const [row, column] = model.get("selected");
    if (row !== undefined && column !== undefined) outline(context, g, row, ...windowSteps("1", column, g.columns), pens.accent, pens.ground);
    const at = hover ?? (focused ? cursor : null);
    if (at && at[0] < g.rows) outline(context, g, at[0], ...windowSteps(model.get("window"), at[1], g.columns), pens.strong, pens.ground);
    drawAxis(g, at);
    placeSpinner(g);
    for (const [i, label] of [...siteList.children].entries()) label.classList.toggle("on", i === at?.[0] || (!at && i === row));
    setText(readout, at ? describe(at) : row !== undefined && column !== undefined ? describe([row, column]) : hintText());
  }

  function hintText(): string {
    return values.some(Number.isFinite) ? "" : panel.saved ? "nothing was patched" : "click a cell to patch";
  }

  function drawAxis(g: Geometry, at: Cell | null): void {
    const covered = at ? windowSteps(model.get("window"), at[1], g.columns) : [0, 0];
    const every = g.cellWidth >= 20 ? 1 : g.cellWidth >= 12 ? 2 : 5;
    if (axis.childElementCount !== g.columns) axis.replaceChildren(...Array.from({ length: g.columns }, () => h("span")));
    [...axis.children].forEach((tick, i) => {
      const element = tick as HTMLElement;
      element.style.width = `${g.cellWidth}px`;
      element.classList.toggle("on", i >= covered[0]! && i < covered[1]!);
      setText(element, i % every === 0 ? String(i) : "");
    });
  }

  function placeSpinner(g: Geometry): void {
    const [row, column] = model.get("busy");
    spinner.hidden = row === undefined || column === undefined;
    if (row === undefined || column === undefined) return;
    spinner.style.left = `${column * g.cellWidth + g.cellWidth / 2 - 7}px`;
    spinner.style.top = `${row * g.cellHeight + g.cellHeight / 2 - 7}px`;
  }

  function valueText([row, column]: Cell): string {
    const value = values[row * model.get("steps") + column] ?? NaN;
    if (!Number.isFinite(value)) return "click to patch";
    const floor = model.get("noise_floor");
    const beside = floor === null || floor === undefined ? "" : Math.abs(value) <= floor ? " · within the noise floor" : "";
    return `${model.get("metric") || "value"} ${significant(value)}${beside}`;
  }

  function describe(cell: Cell): string {
    const [first, end] = windowSteps(model.get("window"), cell[1], model.get("steps"));
    const site = (model.get("sites")[cell[0]] ?? "").replace(/:output$/, "");
    return `${valueText(cell)} · ${stepsText(first, end)} · ${site}`;
  }

  function cellAt(event: MouseEvent): Cell | null {
    const g = geometry();
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / g.cellWidth);
    const row = Math.floor((event.clientY - box.top) / g.cellHeight);
    return row >= 0 && row < g.rows && column >= 0 && column < g.columns ? [row, column] : null;
  }

  function showTip(event: MouseEvent): void {
    tip.hidden = hover === null;
    if (!hover) return;
    const [first, end] = windowSteps(model.get("window"), hover[1], model.get("steps"));
    tip.replaceChildren(
      h("div", { class: "wb-mono" }, model.get("sites")[hover[0]] ?? ""),
      h("div", {}, stepsText(first, end)), h("div", { class: "map-tip-value" }, valueText(hover)));
    const box = root.getBoundingClientRect();
    const x = event.clientX - box.left + 12;
    const y = event.clientY - box.top + 16;
    tip.style.left = `${Math.min(x, box.width - tip.offsetWidth - 8)}px`;
    tip.style.top = `${y + tip.offsetHeight > box.height - 4 ? y - tip.offsetHeight - 28 : y}px`;
  }

  function pick(cell: Cell): void {
    cursor = cell;
    model.set("selected", [...cell]);
    model.save_changes();
    if (!panel.saved) model.send({ kind: "cell", row: cell[0], column: cell[1] });
    draw();
  }

  function chooseWindow(value: string): void {
    model.set("window", value);
    model.save_changes();
    if (!panel.saved) model.send({ kind: "window", value });
  }

  grid.addEventListener("mousemove", (event) => {
    hover = cellAt(event);
    showTip(event);
    draw();
  });
  grid.addEventListener("mouseleave", () => {
    hover = null;
    tip.hidden = true;
    draw();
  });
  grid.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) pick(cell);
  });
  grid.addEventListener("focus", () => {
    focused = grid.matches(":focus-visible");
    draw();
  });
  grid.addEventListener("blur", () => {
    focused = false;
    draw();
  });
  grid.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [row, column] = cursor;
    const columns = model.get("steps");
    const rows = model.get("sites").length;
    const moves: Record<string, Cell> = {
      ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1], ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
      Home: [row, 0], End: [row, columns - 1], PageUp: [0, column], PageDown: [rows - 1, column],
    };
    const to = moves[event.key];
    if (to) cursor = [Math.max(0, Math.min(rows - 1, to[0])), Math.max(0, Math.min(columns - 1, to[1]))];
    else if (event.key === "Enter" || event.key === " ") pick(cursor);
    else return;
    event.preventDefault();
    focused = true;
    hover = null;
    tip.hidden = true;
    draw();
  });

  panel.watch(["sites"], () => {
    const sites = model.get("sites");
    const short = shorten(sites);
    siteList.replaceChildren(...sites.map((site, i) => h("div", { class: "map-site wb-mono", title: site }, h("bdi", {}, short[i]!))));
    nothing.hidden = sites.length > 0;
    scroll.hidden = foot.hidden = sites.length === 0;
  });
  panel.watch(["values", "sites", "steps"], () => {
    const raw = bytes(model.get("values"));
    const size = model.get("sites").length * model.get("steps");
    values = raw && raw.byteLength === 4 * size ? new Float32Array(raw.slice().buffer) : new Float32Array(size).fill(NaN);
    draw();
  });
  panel.watch(["window"], () => {
    windows.show(WINDOWS, model.get("window"), panel.saved);
    draw();
  });
  panel.watch(["status", "progress", "sites"], () => {
    const running = model.get("status") === "running";
    const { done = 0, of = 0 } = model.get("progress") ?? {};
    const none = model.get("sites").length === 0;
    fill.hidden = running || panel.saved;
    fill.disabled = none;
    stop.hidden = !running;
    setText(progress, running && of ? `${done} of ${of}` : "");
  });
  panel.watch(["source_label", "target_label", "metric"], () => {
    const [source, target] = [model.get("source_label"), model.get("target_label")];
    const between = source || target ? `${source} → ${target}` : "";
    setText(labels, [model.get("metric"), between].filter(Boolean).join(" · "));
    labels.title = labels.textContent ?? "";
  });
  panel.watch(["values", "metric", "noise_floor", "limit", "signed"], showLegend);
  panel.watch(["metric", "source_label", "target_label"], () => {
    grid.setAttribute("aria-label", `${model.get("metric") || "Patch map"}: layers by steps. Arrows move, Enter patches.`);
  });
  panel.watch(["selected", "busy"], () => {
    const [row, column] = model.get("selected");
    if (row !== undefined && column !== undefined) cursor = [row, column];
    draw();
  });

  function showLegend(): void {
    scale = scaleNow();
    ramp.style.backgroundImage = gradient(scale.colours);
    setText(low, scale.signed ? `−${significant(scale.limit)}` : "0");
    setText(high, significant(scale.limit));
    const floor = model.get("noise_floor");
    const known = floor !== null && floor !== undefined;
    floorTick.hidden = !known;
    mirrorTick.hidden = !known || !scale.signed;
    setText(floorText, known ? `noise floor ${scale.signed ? "±" : ""}${significant(floor)}` : "");
    floorTick.style.left = `${100 * position(floor ?? 0, scale)}%`;
    mirrorTick.style.left = `${100 * position(-(floor ?? 0), scale)}%`;
    draw();
  }
  onTheme(showLegend, signal);
  onResize(root, draw, signal);
}

export default widget<State>("patch-map", "Patch map", css, build);
