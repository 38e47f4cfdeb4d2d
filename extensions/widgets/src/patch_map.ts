/** PatchMap: layer × step, each cell one patch; click to make it, hover to read it. */

import { onResize } from "./lib/canvas";
import { isDark, onTheme, table } from "./lib/colour";
import { empty, h, setText, textButton } from "./lib/dom";
import { significant } from "./lib/format";
import { type Panel, widget } from "./lib/panel";
import { segments } from "./lib/segments";
import { perFrame } from "./lib/timing";
import { autoLimit, type Scale } from "./patch_grid";
import { Legend } from "./patch_legend";
import css from "./patch_map.css";
import { Plot } from "./patch_plot";
import { type Cell, cellOf, type State, unpack } from "./patch_state";
import { stepsText, WINDOWS, windowSteps } from "./patch_window";

class PatchMap {
  private values: Float32Array = new Float32Array();
  private scale: Scale = { colours: table("viridis"), limit: 1, signed: false };

  private readonly labels = h("span", { class: "map-labels wb-muted wb-clip" });
  private readonly windows = segments("Steps a patch covers", (value) => this.chooseWindow(value));
  private readonly progress = h("span", { class: "wb-muted" });
  private readonly fill = textButton("Fill all", () => this.model.send({ kind: "fill" }));
  private readonly stop = textButton("Stop", () => this.model.send({ kind: "stop" }));
  private readonly tip = h("div", { class: "map-tip", role: "tooltip", hidden: true });
  private readonly readout = h("span", { class: "map-readout wb-clip", "aria-live": "polite" });
  private readonly legend = new Legend();
  private readonly foot = h("footer", { class: "map-foot" }, this.readout, this.legend.element);
  private readonly nothing = empty("No sites", "Load a model and run source and target to patch between them.");
  private readonly plot = new Plot({
    move: (at, pointer) => {
      this.showTip(pointer ? at : null, pointer);
      this.draw();
    },
    pick: (cell) => this.pick(cell),
  });
  private readonly draw = perFrame(() => this.drawNow());

  constructor(private readonly panel: Panel<State>) {
    const windows = h("div", { class: "map-window" }, h("span", { class: "wb-muted" }, "steps"), this.windows.element);
    const actions = h("div", { class: "wb-end" }, windows, this.progress, this.fill, this.stop);
    const head = h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Patch map"), this.labels, actions);
    panel.root.append(head, this.nothing, this.plot.element, this.foot, this.tip);
    this.follow();
    onTheme(() => this.rescale(), panel.signal);
    onResize(panel.root, this.draw, panel.signal);
  }

  private get model(): Panel<State>["model"] {
    return this.panel.model;
  }

  private follow(): void {
    const { panel } = this;
    panel.watch(["sites", "steps"], () => this.reshape());
    panel.watch(["values", "sites", "steps"], () => this.revalue());
    panel.watch(["noise_floor", "limit", "signed"], () => this.rescale());
    panel.watch(["window"], () => {
      this.windows.show(WINDOWS, this.model.get("window"), panel.saved);
      this.draw();
    });
    panel.watch(["status", "progress", "sites"], () => this.showStatus());
    panel.watch(["source_label", "target_label", "metric"], () => this.showLabels());
    panel.watch(["selected", "busy"], () => {
      const selected = cellOf(this.model.get("selected"));
      if (selected) this.plot.startFrom(selected);
      this.draw();
    });
  }

  private reshape(): void {
    const sites = this.model.get("sites");
    this.plot.shape(sites, this.model.get("steps"));
    this.nothing.hidden = sites.length > 0;
    this.plot.element.hidden = this.foot.hidden = sites.length === 0;
  }

  private revalue(): void {
    this.values = unpack(this.model.get("values"), this.model.get("sites").length * this.model.get("steps"));
    this.rescale();
  }

  private rescale(): void {
    const [signed, limit, floor] = [this.model.get("signed"), this.model.get("limit"), this.model.get("noise_floor")];
    const diverging = isDark(this.panel.root) ? "dark" : "light";
    this.scale = { signed, limit: limit > 0 ? limit : autoLimit(this.values, floor), colours: table(signed ? diverging : "viridis") };
    this.legend.show(this.scale, floor);
    this.draw();
  }

  private drawNow(): void {
    const selected = cellOf(this.model.get("selected"));
    this.plot.draw({ values: this.values, scale: this.scale, window: this.model.get("window"), selected, busy: cellOf(this.model.get("busy")) });
    const cell = this.plot.at ?? selected;
    setText(this.readout, cell ? this.describe(cell) : this.hint());
  }

  private showStatus(): void {
    const running = this.model.get("status") === "running";
    const { done = 0, of = 0 } = this.model.get("progress") ?? {};
    this.fill.hidden = running || this.panel.saved;
    this.fill.disabled = this.model.get("sites").length === 0;
    this.stop.hidden = !running;
    setText(this.progress, running && of ? `${done} of ${of}` : "");
  }

  private showLabels(): void {
    const [source, target] = [this.model.get("source_label"), this.model.get("target_label")];
    const metric = this.model.get("metric");
    const text = [metric, source || target ? `${source} → ${target}` : ""].filter(Boolean).join(" · ");
    setText(this.labels, text);
    this.labels.title = text;
    this.plot.grid.setAttribute("aria-label", `${metric || "Patch map"}: layers by steps. Arrows move, Enter patches.`);
  }

  private hint(): string {
    if (this.values.some(Number.isFinite)) return "";
    return this.panel.saved ? "nothing was patched" : "click a cell to patch";
  }

  private valueText([row, column]: Cell): string {
    const value = this.values[row * this.model.get("steps") + column] ?? NaN;
    if (!Number.isFinite(value)) return "click to patch";
    const floor = this.model.get("noise_floor");
    const within = floor !== null && floor !== undefined && Math.abs(value) <= floor;
    return `${this.model.get("metric") || "value"} ${significant(value)}${within ? " · within the noise floor" : ""}`;
  }

  private stepsOf([, column]: Cell): string {
    return stepsText(...windowSteps(this.model.get("window"), column, this.model.get("steps")));
  }

  private describe(cell: Cell): string {
    const site = (this.model.get("sites")[cell[0]] ?? "").replace(/:output$/, "");
    return `${this.valueText(cell)} · ${this.stepsOf(cell)} · ${site}`;
  }

  private showTip(cell: Cell | null, pointer: MouseEvent | null): void {
    const { tip } = this;
    tip.hidden = cell === null;
    if (!cell || !pointer) return;
    const site = this.model.get("sites")[cell[0]] ?? "";
    tip.replaceChildren(h("div", { class: "wb-mono" }, site), h("div", {}, this.stepsOf(cell)), h("div", { class: "map-tip-value" }, this.valueText(cell)));
    const box = this.panel.root.getBoundingClientRect();
    const x = pointer.clientX - box.left + 12;
    const y = pointer.clientY - box.top + 16;
    tip.style.left = `${Math.max(4, Math.min(x, box.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + tip.offsetHeight > box.height - 4 ? y - tip.offsetHeight - 28 : y}px`;
  }

  private pick(cell: Cell): void {
    this.model.set("selected", [...cell]);
    this.model.save_changes();
    if (!this.panel.saved) this.model.send({ kind: "cell", row: cell[0], column: cell[1] });
    this.draw();
  }

  private chooseWindow(value: string): void {
    this.model.set("window", value);
    this.model.save_changes();
    if (!this.panel.saved) this.model.send({ kind: "window", value });
  }
}

export default widget<State>("patch-map", "Patch map", css, (panel) => void new PatchMap(panel));
