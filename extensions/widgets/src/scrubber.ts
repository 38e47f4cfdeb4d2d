/** StepScrubber: every step of every run, side by side, with attention over it; never asks the kernel. */

import { drawPicture, fit, onResize } from "./lib/canvas";
import { gradient, table } from "./lib/colour";
import { empty, h, setText } from "./lib/dom";
import { significant } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { segments } from "./lib/segments";
import { perFrame, throttle } from "./lib/timing";
import css from "./scrubber.css";
import { FINAL, frameBytes, Frames, type Lane, stepCount } from "./scrubber_frames";
import { type Attention, Maps, paint, type Token } from "./scrubber_maps";
import { slider } from "./scrubber_slider";
import { words } from "./scrubber_words";

interface LedgerRow {
  step?: number;
  timestep?: number;
  sigma?: number;
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
}

interface Figure {
  element: HTMLElement;
  canvas: HTMLCanvasElement;
  frame: HTMLElement;
}

function build(panel: Panel<State>): () => void {
  const { root, model, signal } = panel;
  const colours = table("viridis");
  const scratch = document.createElement("canvas");
  let step = 0;
  let steps = 0;
  let blend = 0.65;
  let lanes: Lane[] = [];
  let figures: Figure[] = [];
  let maps: Maps | null = null;

  const draw = perFrame(drawAll);
  const save = throttle(() => model.save_changes(), 100);
  const frames = new Frames(draw);

  const readout = h("output", { class: "scrub-readout" });
  const kinds = segments("What to show", (kind) => put("kind", kind));
  const time = slider(moveTo, () => step, () => steps);
  const stage = h("div", { class: "scrub-stage" });
  const nothing = empty("No steps yet", "Run to scrub through them.");
  const broken = h("p", { class: "scrub-broken wb-muted", hidden: true });
  const chips = words((tokens) => put("selected_tokens", tokens));
  const layers = h("select", { class: "wb-select", "aria-label": "Attention layer" });
  const range = h("input", { class: "wb-range", type: "range", min: 0, max: 100, value: 65, "aria-label": "Overlay strength" });
  const top = h("span");
  const legend = h("div", { class: "scrub-legend" },
    h("span", { class: "wb-muted scrub-word" }, "attention"), h("span", {}, "0"),
    h("div", { class: "scrub-ramp", style: `background:${gradient(colours)}` }), top);
  const hint = h("span", { class: "wb-muted" });
  const overlay = h("div", { class: "scrub-overlay" }, layers, h("label", { class: "scrub-blend" }, h("span", { class: "wb-muted scrub-word" }, "blend"), range), legend, hint);
  const body = h("div", { class: "scrub-body" }, time.element, kinds.element, stage, broken, chips.element, overlay);
  root.append(
    h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Steps"), h("div", { class: "wb-end" }, readout)),
    nothing, body,
  );

  function put<K extends keyof State & string>(key: K, value: State[K]): void {
    model.set(key, value);
    save();
  }

  function moveTo(wanted: number): void {
    const next = Math.max(0, Math.min(steps - 1, wanted));
    if (next === step || steps === 0) return;
    step = next;
    put("step", step);
    draw();
  }

  function describe(): string {
    const row = model.get("rows")[step];
    const parts = [`step ${row?.step ?? step}`];
    if (row?.timestep !== undefined && row.timestep !== null) parts.push(`t ${row.timestep >= 10 ? Math.round(row.timestep) : significant(row.timestep)}`);
    if (row?.sigma !== undefined && row.sigma !== null) parts.push(`σ ${row.sigma.toFixed(2)}`);
    return parts.join(" · ");
  }

  function allKinds(): string[] {
    const named = model.get("kinds");
    return lanes.some((lane) => lane.final) && !named.includes(FINAL) ? [...named, FINAL] : named;
  }

  function shownKind(): string {
    const kind = model.get("kind");
    return allKinds().includes(kind) ? kind : (allKinds()[0] ?? "");
  }

  function figure(lane: Lane): Figure {
    const canvas = h("canvas", { class: "wb-crisp", role: "img" });
    const frame = h("div", { class: "scrub-frame wb-void" }, canvas);
    const element = h("figure", { class: "scrub-lane" }, h("figcaption", { class: "wb-clip", title: lane.label }, lane.label), frame);
    return { element, canvas, frame };
  }

  function drawAll(): void {
    if (signal.aborted) return;
    const text = steps ? describe() : "";
    setText(readout, text);
    time.show(step, steps, text);
    figures.forEach((item, i) => drawFigure(item, i, text));
    broken.hidden = frames.broken === 0;
    setText(broken, `${frames.broken} ${frames.broken === 1 ? "frame" : "frames"} could not be decoded.`);
  }

  function drawFigure({ canvas, frame }: Figure, i: number, text: string): void {
    const lane = lanes[i]!;
    const picture = frames.get(frameBytes(lane, shownKind(), step));
    const bitmap = picture instanceof ImageBitmap ? picture : null;
    frame.dataset["state"] = bitmap ? "shown" : (picture as string | null) ?? "none";
    // While the next frame is being decoded the one before stays: a flash of emptiness is worse.
    if (picture === "pending") return;
    const width = frame.clientWidth;
    if (bitmap) frame.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
    const context = fit(canvas, width, bitmap ? (width * bitmap.height) / bitmap.width : width);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (bitmap) drawPicture(context, bitmap);
    const tokens = model.get("selected_tokens");
    if (maps && bitmap && tokens.length && i === maps.lane) drawOverlay(context, maps, tokens);
    canvas.setAttribute("aria-label", `${lane.label}, ${shownKind()}, ${text}`);
  }

  function drawOverlay(context: CanvasRenderingContext2D, source: Maps, tokens: readonly number[]): void {
    const layer = model.get("layer");
    paint(source.field(layer, step, tokens), source.top(layer, tokens), colours, scratch);
    context.save();
    context.globalAlpha = blend;
    drawPicture(context, scratch);
    context.restore();
  }

  function showOverlay(): void {
    const attention = model.get("attention") ?? {};
    const tokens = attention.tokens ?? model.get("words") ?? [];
    const chosen = model.get("selected_tokens");
    chips.show(tokens, chosen, maps !== null);
    const names = maps?.layers ?? [];
    layers.replaceChildren(...names.map((name, i) => h("option", { value: i }, name)));
    layers.value = String(Math.min(model.get("layer"), names.length - 1));
    const on = maps !== null && chosen.length > 0;
    overlay.hidden = tokens.length === 0;
    layers.hidden = maps === null;
    legend.hidden = range.parentElement!.hidden = !on;
    setText(hint, on ? "" : maps ? "click a word to overlay its attention, shift-click to add more" : "no attention was captured");
    if (on) setText(top, significant(maps!.top(model.get("layer"), chosen)));
    draw();
  }

  root.addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    if (target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 5 : 1;
    const moves: Record<string, number> = { ArrowRight: step + far, ArrowUp: step + far, ArrowLeft: step - far, ArrowDown: step - far, Home: 0, End: steps - 1, PageUp: step + 5, PageDown: step - 5 };
    const to = moves[event.key];
    if (to !== undefined) {
      event.preventDefault();
      time.stop();
      moveTo(to);
    } else if (event.key === " " && !target.matches("button")) {
      event.preventDefault();
      time.toggle();
    } else if (event.key === "Escape" && model.get("selected_tokens").length) put("selected_tokens", []);
  });
  layers.addEventListener("change", () => put("layer", Number(layers.value)));
  range.addEventListener("input", () => {
    blend = Number(range.value) / 100;
    draw();
  });

  panel.watch(["lanes", "rows", "curve"], () => {
    lanes = model.get("lanes") ?? [];
    steps = stepCount(lanes, model.get("rows"));
    step = Math.max(0, Math.min(steps - 1, model.get("step")));
    frames.keepOnly(lanes);
    if (figures.length !== lanes.length || figures.some((item, i) => item.element.firstChild?.textContent !== lanes[i]!.label)) {
      figures = lanes.map(figure);
      stage.replaceChildren(...figures.map((item) => item.element));
    }
    stage.style.setProperty("--lanes", String(Math.max(1, lanes.length)));
    nothing.hidden = steps > 0;
    body.hidden = steps === 0;
    time.curve(model.get("curve") ?? [], steps);
    frames.warm(lanes, shownKind());
    draw();
  });
  panel.watch(["step"], () => {
    step = Math.max(0, Math.min(steps - 1, model.get("step")));
    draw();
  });
  panel.watch(["kinds", "kind", "lanes"], () => {
    kinds.element.hidden = allKinds().length < 2;
    kinds.show(allKinds(), shownKind());
    frames.warm(lanes, shownKind());
    draw();
  });
  panel.watch(["attention"], () => {
    maps = Maps.from(model.get("attention") ?? {});
  });
  panel.watch(["attention", "words", "selected_tokens", "layer"], showOverlay);
  onResize(stage, draw, signal);
  return () => {
    time.stop();
    frames.keepOnly([]);
  };
}

export default widget<State>("scrubber", "Step scrubber", css, build);
