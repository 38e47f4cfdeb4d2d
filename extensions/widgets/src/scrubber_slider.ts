/** The time line: a slider under a sparkline, with step buttons and play. */

import { h, glyph, iconButton, s, setAttributes } from "./lib/dom";

export interface Slider {
  element: HTMLElement;
  show(step: number, steps: number, text: string): void;
  curve(values: readonly number[], steps: number): void;
  toggle(): void;
  stop(): void;
}

const INSET = 8;
const HEIGHT = 24;
const FRAME_MS = 125;

export function slider(move: (step: number) => void, current: () => number, count: () => number): Slider {
  const back = iconButton("previous", "Step back", () => move(current() - 1));
  const play = iconButton("play", "Play", toggle);
  const on = iconButton("next", "Step forward", () => move(current() + 1));
  const area = s("path", { class: "slider-area" });
  const line = s("path", { class: "slider-line" });
  const spark = s("svg", { class: "slider-spark", preserveAspectRatio: "none", viewBox: `0 0 100 ${HEIGHT}`, "aria-hidden": "true" }, area, line);
  const fill = h("div", { class: "slider-fill" });
  const ticks = h("div", { class: "slider-ticks", "aria-hidden": "true" });
  const thumb = h("div", { class: "slider-thumb" });
  const rail = h("div", { class: "slider-rail", role: "slider", tabindex: "0", "aria-label": "Step", "aria-valuemin": 0 }, spark, ticks, h("div", { class: "slider-track" }, fill), thumb);
  const element = h("div", { class: "slider" }, h("div", { class: "slider-buttons" }, back, play, on), rail);
  let timer: ReturnType<typeof setInterval> | undefined;

  function stop(): void {
    clearInterval(timer);
    timer = undefined;
    play.replaceChildren(glyph("play"));
    play.setAttribute("aria-label", "Play");
    play.title = "Play (Space)";
  }

  function toggle(): void {
    if (timer !== undefined) return stop();
    play.replaceChildren(glyph("pause"));
    play.setAttribute("aria-label", "Pause");
    play.title = "Pause (Space)";
    timer = setInterval(() => {
      if (!element.isConnected) return stop();
      move(current() >= count() - 1 ? 0 : current() + 1);
    }, FRAME_MS);
  }

  function dragTo(event: PointerEvent): void {
    const box = rail.getBoundingClientRect();
    const part = (event.clientX - box.left - INSET) / Math.max(1, box.width - 2 * INSET);
    move(Math.round(part * (count() - 1)));
  }
  rail.addEventListener("pointerdown", (event) => {
    stop();
    rail.setPointerCapture(event.pointerId);
    dragTo(event);
  });
  rail.addEventListener("pointermove", (event) => {
    if (rail.hasPointerCapture(event.pointerId)) dragTo(event);
  });

  function show(step: number, steps: number, text: string): void {
    const part = steps > 1 ? step / (steps - 1) : 0;
    element.style.setProperty("--part", String(part));
    setAttributes(rail, { "aria-valuemax": Math.max(0, steps - 1), "aria-valuenow": step, "aria-valuetext": text });
    back.disabled = step <= 0;
    on.disabled = step >= steps - 1;
    play.disabled = steps < 2;
    if (ticks.childElementCount !== steps && steps <= 100) ticks.replaceChildren(...Array.from({ length: steps }, () => h("i")));
  }

  function curve(values: readonly number[], steps: number): void {
    const finite = values.filter(Number.isFinite);
    spark.toggleAttribute("hidden", finite.length < 2);
    if (finite.length < 2) return;
    const low = Math.min(0, ...finite);
    const high = Math.max(...finite);
    const y = (value: number): number => HEIGHT - 2 - ((value - low) / (high - low || 1)) * (HEIGHT - 4);
    const points = values.map((value, i) => `${((100 * i) / Math.max(1, steps - 1)).toFixed(2)} ${y(Number.isFinite(value) ? value : low).toFixed(2)}`);
    const end = ((100 * (values.length - 1)) / Math.max(1, steps - 1)).toFixed(2);
    line.setAttribute("d", `M${points.join("L")}`);
    area.setAttribute("d", `M0 ${HEIGHT}L${points.join("L")}L${end} ${HEIGHT}z`);
  }
  return { element, show, curve, toggle, stop };
}
