/** RunControls: two prompts, a seed, a button, and what the run is doing. */

import { ErrorBox, NumberField, type NumberName, PromptField } from "./controls_fields";
import { type Bytes, decode, drawPicture } from "./lib/canvas";
import { glyph, h, iconButton, setText, textButton } from "./lib/dom";
import { duration, speed } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { throttle } from "./lib/timing";
import css from "./controls.css";

interface State extends ElementState {
  model_name: string;
  scheduler: string;
  source: string;
  target: string;
  seed: number;
  steps: number;
  guidance: number;
  source_from: number;
  source_seed: number | null;
  can_prompt: boolean;
  can_guide: boolean;
  can_step: boolean;
  status: "idle" | "running" | "stopping" | "error" | "done";
  progress: { label?: string; step?: number; of?: number; rate?: number | null; left?: number | null };
  preview: Bytes;
  error: { title?: string; text?: string };
}

const SAVE_MS = 200;
const SEEDS = 1_000_000;

class RunControls {
  private latestPreview = 0;

  private readonly save = throttle(() => this.model.save_changes(), SAVE_MS);
  private readonly name = h("span", { class: "controls-model wb-clip" });
  private readonly scheduler = h("span", { class: "wb-muted wb-clip" });
  private readonly complaint = h("span", { class: "controls-complaint", role: "alert" });
  private readonly state = h("span", { class: "controls-state wb-muted" });
  private readonly run = textButton("Run", () => this.start(), "wb-primary controls-run");
  private readonly stopWord = h("span", {}, "Stop");
  private readonly stop = textButton("", () => this.model.send({ kind: "stop" }), "controls-run");
  private readonly bar = h("div", { class: "controls-bar" });
  private readonly track = h("div", { class: "controls-track", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0 }, this.bar);
  private readonly canvas = h("canvas", { class: "wb-crisp", hidden: true });
  private readonly dice = iconButton("dice", "Another seed", () => this.put("seed", Math.floor(Math.random() * SEEDS)));
  private readonly numbers = (["seed", "steps", "guidance"] as const).map((name) => this.numberField(name));
  private readonly leaving = this.numberField("source_from");
  private readonly sourceSeed = this.numberField("source_seed");
  private readonly fields = [...this.numbers, this.leaving, this.sourceSeed];
  private readonly head = h("div", { class: "controls-numbers" }, ...this.numbers.map((field) => field.element));
  private readonly prompts = [
    new PromptField("source", "What the activation comes from", (text) => this.put("source", text)),
    new PromptField("target", "What it is put into", (text) => this.put("target", text)),
  ] as const;
  private readonly error = new ErrorBox(iconButton("close", "Dismiss", () => this.dismiss()));

  constructor(private readonly panel: Panel<State>) {
    this.run.prepend(glyph("play"));
    this.run.title = "Run (Ctrl+Enter)";
    this.stop.append(glyph("stop"), this.stopWord);
    this.numbers[0]!.element.append(this.dice);
    this.leaving.element.title =
      "0: the source runs on its own. A later step: it leaves the target's run there, so that both images have one layout.";
    this.sourceSeed.element.title = "The source has its own noise";
    this.prompts[0].element.append(this.leaving.element);
    this.build();
    this.follow();
    if (panel.saved) this.freeze();
    panel.root.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.start();
    });
  }

  private get model(): Panel<State>["model"] {
    return this.panel.model;
  }

  private get active(): boolean {
    return ["running", "stopping"].includes(this.model.get("status"));
  }

  private numberField(name: NumberName): NumberField {
    return new NumberField(name, (value) => this.put(name, value), () => this.showStatus());
  }

  private build(): void {
    const head = h("header", { class: "wb-head controls-head" },
      h("div", { class: "controls-name" }, this.name, this.scheduler),
      this.head, this.complaint, h("div", { class: "wb-end" }, this.state, this.run, this.stop));
    const preview = h("div", { class: "controls-preview wb-void", role: "img", "aria-label": "Live preview" }, this.canvas);
    const prompts = h("div", { class: "controls-prompts" }, ...this.prompts.map((field) => field.element));
    this.panel.root.append(head, this.track, h("div", { class: "controls-body" }, preview, prompts), this.error.element);
  }

  private follow(): void {
    const { panel, model } = this;
    for (const field of this.fields) panel.watch([field.name], () => field.show(model.get(field.name)));
    panel.watch(["can_prompt", "source_seed"], () => this.showKind());
    panel.watch(["source"], () => this.prompts[0].show(model.get("source")));
    panel.watch(["target"], () => this.prompts[1].show(model.get("target")));
    panel.watch(["model_name", "scheduler"], () => {
      setText(this.name, model.get("model_name") || "No model");
      setText(this.scheduler, model.get("scheduler"));
      this.name.title = model.get("model_name");
    });
    panel.watch(["status", "can_guide", "can_step"], () => this.showStatus());
    panel.watch(["progress"], () => this.showProgress());
    panel.watch(["error"], () => this.error.show(model.get("error")?.title ?? "", model.get("error")?.text ?? ""));
    panel.watch(["preview"], () => void this.showPreview());
  }

  /** In a saved page the fields can be read and copied, not changed. */
  private freeze(): void {
    for (const field of this.fields) field.input.readOnly = true;
    for (const field of this.prompts) field.area.readOnly = true;
    this.dice.disabled = true;
  }

  /** Runs differ by their prompts, or by their seeds where the model takes no prompt. */
  private showKind(): void {
    const worded = this.model.get("can_prompt");
    for (const field of this.prompts) field.area.hidden = !worded;
    this.leaving.element.hidden = !worded;
    if (this.model.get("source_seed") === null) this.sourceSeed.element.remove();
    else this.leaving.element.before(this.sourceSeed.element);
    const seed = this.numbers[0]!.element;
    if (worded) this.head.prepend(seed);
    else this.prompts[1].element.append(seed);
  }

  private put<K extends keyof State & string>(key: K, value: State[K]): void {
    this.model.set(key, value);
    this.save();
  }

  private start(): void {
    if (this.run.disabled || this.run.hidden) return;
    this.model.save_changes();
    this.model.send({ kind: "run" });
  }

  private dismiss(): void {
    this.error.show("", "");
    this.model.send({ kind: "dismiss" });
  }

  private showStatus(): void {
    const stopping = this.model.get("status") === "stopping";
    const refused = this.fields.map((field) => field.refused).find(Boolean) ?? "";
    this.run.hidden = this.active;
    this.run.disabled = this.panel.saved || refused !== "";
    this.stop.hidden = !this.active;
    this.stop.disabled = stopping;
    setText(this.stopWord, stopping ? "Stopping" : "Stop");
    setText(this.complaint, refused);
    const [, steps, guidance] = this.numbers;
    steps!.allow(this.model.get("can_step"), "Its own number of steps");
    guidance!.allow(this.model.get("can_guide"), "This pipeline has no guidance");
    this.showProgress();
  }

  private showProgress(): void {
    const { step = 0, of = 0 } = this.model.get("progress") ?? {};
    const known = of > 0;
    this.track.classList.toggle("unknown", this.active && !known);
    this.track.setAttribute("aria-valuemax", String(of || 1));
    this.track.setAttribute("aria-valuenow", String(step));
    this.bar.style.width = this.active && known ? `${(100 * step) / of}%` : "0";
    setText(this.state, this.active ? this.progressText() : this.idleText());
  }

  private progressText(): string {
    const { label = "", step = 0, of = 0, rate, left } = this.model.get("progress") ?? {};
    const remaining = left !== null && left !== undefined ? `${duration(left)} left` : "";
    const parts = [label, of > 0 ? `${step} of ${of}` : "", rate ? speed(rate) : "", remaining];
    return parts.filter(Boolean).join(" · ") || "starting";
  }

  private idleText(): string {
    if (this.panel.saved) return "saved page, no kernel";
    return this.model.get("status") === "done" ? "done" : "";
  }

  /** Previews may come faster than they decode; only the latest is drawn. */
  private async showPreview(): Promise<void> {
    const mine = ++this.latestPreview;
    const picture = await decode(this.model.get("preview")).catch(() => null);
    if (mine !== this.latestPreview) return;
    this.canvas.hidden = !picture;
    if (!picture) return;
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    drawPicture(this.canvas.getContext("2d")!, picture);
    picture.close();
  }
}

export default widget<State>("controls", "Run controls", css, (panel) => void new RunControls(panel));
