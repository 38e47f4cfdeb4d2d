/** StepScrubber: every step of every run, side by side, with attention over it; never asks the kernel. */

import { onResize } from "./lib/canvas";
import { empty, h, setText } from "./lib/dom";
import { significant } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { segments } from "./lib/segments";
import { perFrame, throttle } from "./lib/timing";
import css from "./scrubber.css";
import { FINAL, Frames, type Lane, stepCount } from "./scrubber_frames";
import { type Attention, Maps, type Place, type Token } from "./scrubber_maps";
import { OverlayRow } from "./scrubber_overlay";
import { slider } from "./scrubber_slider";
import { type Overlay, Stage } from "./scrubber_stage";
import { words } from "./scrubber_words";

interface LedgerRow {
  step?: number;
  timestep?: number | null;
  sigma?: number | null;
}

interface State extends ElementState {
  lanes: Lane[];
  kinds: string[];
  kind: string;
  step: number;
  rows: LedgerRow[];
  curve: number[];
  words: Token[];
  attention: Attention;
  selected_tokens: number[];
  layer: number;
  place: number[];
}

/** How often the kernel hears of a new step while scrubbing. */
const SAVE_MS = 100;
const FAR = 5;

class Scrubber {
  private step = 0;
  private steps = 0;
  private maps: Maps | null = null;

  private readonly draw = perFrame(() => this.drawNow());
  private readonly save = throttle(() => this.model.save_changes(), SAVE_MS);
  private readonly frames = new Frames(this.draw);
  private readonly readout = h("output", { class: "scrub-readout" });
  private readonly kinds = segments("What to show", (kind) => this.put("kind", kind));
  private readonly time = slider((to) => this.moveTo(to), () => this.step, () => this.steps);
  private readonly stage = new Stage(this.frames, {
    at: (place) => this.pointAt(this.maps?.centre(place) ?? null),
    move: (right, down) => this.pointAt(this.maps?.centre(this.place() ?? { x: 0.5, y: 0.5 }, right, down) ?? null),
  });
  private readonly broken = h("p", { class: "scrub-broken wb-muted", hidden: true });
  private readonly words = words((tokens) => this.put("selected_tokens", tokens));
  private readonly overlay = new OverlayRow((layer) => this.put("layer", layer), this.draw);
  private readonly nothing = empty("No steps yet", "Run to scrub through them.");
  private readonly body = h("div", { class: "scrub-body" },
    this.time.element, this.kinds.element, this.stage.element, this.broken, this.words.element, this.overlay.element);

  constructor(private readonly panel: Panel<State>) {
    const { root, signal } = panel;
    const head = h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Steps"), h("div", { class: "wb-end" }, this.readout));
    root.append(head, this.nothing, this.body);
    root.addEventListener("keydown", (event) => this.onKey(event));
    panel.watch(["lanes", "rows", "curve"], () => this.showLanes());
    panel.watch(["step"], () => {
      this.step = this.inside(this.model.get("step"));
      this.draw();
    });
    panel.watch(["kinds", "kind", "lanes"], () => this.showKinds());
    panel.watch(["attention"], () => {
      this.maps = Maps.from(this.model.get("attention") ?? {});
    });
    panel.watch(["attention", "words", "selected_tokens", "layer"], () => this.showWords());
    panel.watch(["place"], this.draw);
    onResize(this.stage.element, this.draw, signal);
  }

  dispose(): void {
    this.time.stop();
    this.frames.keepOnly([]);
  }

  private get model(): Panel<State>["model"] {
    return this.panel.model;
  }

  private put<K extends keyof State & string>(key: K, value: State[K]): void {
    this.model.set(key, value);
    this.save();
  }

  private inside(step: number): number {
    return Math.max(0, Math.min(this.steps - 1, step));
  }

  private moveTo(wanted: number): void {
    const next = this.inside(wanted);
    if (next === this.step || this.steps === 0) return;
    this.step = next;
    this.put("step", next);
    this.draw();
  }

  private showLanes(): void {
    const lanes = this.model.get("lanes") ?? [];
    this.steps = stepCount(lanes, this.model.get("rows"));
    this.step = this.inside(this.model.get("step"));
    this.frames.keepOnly(lanes);
    this.frames.warm(lanes, this.kind());
    this.stage.show(lanes);
    this.time.curve(this.model.get("curve") ?? [], this.steps);
    this.nothing.hidden = this.steps > 0;
    this.body.hidden = this.steps === 0;
    this.draw();
  }

  private allKinds(): string[] {
    const named = this.model.get("kinds");
    const finals = (this.model.get("lanes") ?? []).some((lane) => lane.final);
    return finals && !named.includes(FINAL) ? [...named, FINAL] : named;
  }

  /** The kind shown: the one asked for, or the first where there is no such kind. */
  private kind(): string {
    const kinds = this.allKinds();
    const kind = this.model.get("kind");
    return kinds.includes(kind) ? kind : (kinds[0] ?? "");
  }

  private showKinds(): void {
    this.kinds.element.hidden = this.allKinds().length < 2;
    this.kinds.show(this.allKinds(), this.kind());
    this.frames.warm(this.model.get("lanes") ?? [], this.kind());
    this.draw();
  }

  private showWords(): void {
    const attention = this.model.get("attention") ?? {};
    const tokens = attention.tokens ?? this.model.get("words") ?? [];
    const chosen = this.model.get("selected_tokens");
    const layer = this.model.get("layer");
    this.words.show(tokens, chosen, this.maps !== null);
    this.overlay.element.hidden = tokens.length === 0;
    this.overlay.show(this.maps?.layers ?? [], layer, this.maps && chosen.length ? this.maps.top(layer, chosen) : null);
    this.draw();
  }

  private place(): Place | null {
    const [x, y] = this.model.get("place");
    return this.maps && x !== undefined && y !== undefined ? { x, y } : null;
  }

  /** Asks what a place attends to; the same place again asks no more. */
  private pointAt(place: Place | null): void {
    const now = this.place();
    const again = place && now && place.x === now.x && place.y === now.y;
    this.put("place", place && !again ? [place.x, place.y] : []);
    this.draw();
  }

  private laid(): Overlay | null {
    const tokens = this.model.get("selected_tokens");
    if (!this.maps || tokens.length === 0) return null;
    return { maps: this.maps, layer: this.model.get("layer"), tokens, blend: this.overlay.blend };
  }

  private drawNow(): void {
    if (this.panel.signal.aborted) return;
    const text = this.steps ? describe(this.model.get("rows")[this.step], this.step) : "";
    setText(this.readout, text);
    this.time.show(this.step, this.steps, text);
    const place = this.place();
    this.stage.draw({ kind: this.kind(), step: this.step, text, overlay: this.laid(), asked: this.maps?.lane ?? null, place });
    this.tell(place);
    const { broken } = this.frames;
    this.broken.hidden = broken === 0;
    setText(this.broken, `${broken} ${broken === 1 ? "frame" : "frames"} could not be decoded.`);
  }

  /** Says what a place attends to, on the words and in a line. */
  private tell(place: Place | null): void {
    const tokens = this.model.get("attention")?.tokens ?? [];
    const weights = this.maps && place ? this.maps.at(this.model.get("layer"), this.step, place) : null;
    this.words.weigh(tokens, weights);
    if (weights) this.overlay.say(`the place attends to ${largest(tokens, weights)}`);
    else if (!this.maps) this.overlay.say("no attention was captured");
    else if (this.laid()) this.overlay.say("");
    else this.overlay.say("click a word to overlay its attention, or the picture to see what a place attends to");
  }

  private onKey(event: KeyboardEvent): void {
    const target = event.target as HTMLElement;
    if (target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = this.reached(event.key, event.shiftKey ? FAR : 1);
    if (to !== undefined) {
      event.preventDefault();
      this.time.stop();
      this.moveTo(to);
    } else if (event.key === " " && !target.matches("button")) {
      event.preventDefault();
      this.time.toggle();
    } else if (event.key === "Escape" && this.place()) this.pointAt(null);
    else if (event.key === "Escape" && this.model.get("selected_tokens").length) this.put("selected_tokens", []);
  }

  private reached(key: string, by: number): number | undefined {
    const { step } = this;
    const moves: Record<string, number> = {
      ArrowRight: step + by, ArrowUp: step + by, ArrowLeft: step - by, ArrowDown: step - by,
      PageUp: step + FAR, PageDown: step - FAR, Home: 0, End: this.steps - 1,
    };
    return moves[key];
  }
}

/** `circle 0.412 · red 0.201 · start 0.108`: the three largest. */
function largest(tokens: readonly Token[], weights: readonly number[]): string {
  const order = weights.map((_, i) => i).sort((a, b) => weights[b]! - weights[a]!);
  return order.slice(0, 3).map((i) => `${tokens[i]!.text} ${significant(weights[i]!)}`).join(" · ");
}

/** `step 7 · t 641 · σ 2.10`. */
function describe(row: LedgerRow | undefined, step: number): string {
  const { timestep, sigma } = row ?? {};
  const parts = [`step ${row?.step ?? step}`];
  if (timestep !== undefined && timestep !== null) parts.push(`t ${timestep >= 10 ? Math.round(timestep) : significant(timestep)}`);
  if (sigma !== undefined && sigma !== null) parts.push(`σ ${sigma.toFixed(2)}`);
  return parts.join(" · ");
}

export default widget<State>("scrubber", "Step scrubber", css, (panel) => {
  const scrubber = new Scrubber(panel);
  return () => scrubber.dispose();
});
