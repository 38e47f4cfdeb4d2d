/** RunControls: two prompts, a seed, a button, and what the run is doing. */

import { type Bytes, decode, drawPicture } from "./lib/canvas";
import { glyph, h, iconButton, setText, textButton, uniqueId } from "./lib/dom";
import { duration, speed } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { throttle } from "./lib/timing";
import css from "./controls.css";

type Status = "idle" | "running" | "stopping" | "error" | "done";

interface State extends ElementState {
  model_name: string;
  scheduler: string;
  source: string;
  target: string;
  seed: number;
  steps: number;
  guidance: number;
  can_guide: boolean;
  status: Status;
  progress: { label?: string; step?: number; of?: number; rate?: number | null; left?: number | null };
  preview: Bytes;
  error: { title?: string; text?: string };
}

type NumberName = "seed" | "steps" | "guidance";
interface NumberRule { label: string; least: number; most: number; whole: boolean; width: string }

const RULES: Record<NumberName, NumberRule> = {
  seed: { label: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, width: "96px" },
  steps: { label: "Steps", least: 1, most: 1000, whole: true, width: "56px" },
  guidance: { label: "Guidance", least: 0, most: 100, whole: false, width: "56px" },
};

/** Why the text does not fit the rule, or "" where it does. */
export function refusal(rule: NumberRule, text: string): string {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value)) return `${rule.label} must be a number`;
  if (rule.whole && !Number.isInteger(value)) return `${rule.label} must be a whole number`;
  if (value < rule.least) return `${rule.label} must be ${rule.least} or more`;
  if (value > rule.most) return `${rule.label} must be ${rule.most} or less`;
  return "";
}

function build(panel: Panel<State>): void {
  const { root, model } = panel;
  const save = throttle(() => model.save_changes(), 200);
  const refused = new Map<NumberName, string>();

  const name = h("span", { class: "controls-model wb-clip" });
  const scheduler = h("span", { class: "wb-muted wb-clip" });
  const complaint = h("span", { class: "controls-complaint", role: "alert" });
  const state = h("span", { class: "controls-state wb-muted" });
  const run = textButton("Run", () => start(), "wb-primary controls-run");
  run.prepend(glyph("play"));
  run.title = "Run (Ctrl+Enter)";
  const stop = textButton("Stop", () => model.send({ kind: "stop" }), "controls-run");
  stop.prepend(glyph("stop"));

  const fields = (Object.keys(RULES) as NumberName[]).map((key) => numberField(key));
  const dice = iconButton("dice", "Another seed", () => put("seed", Math.floor(Math.random() * 1_000_000)));
  fields[0]!.append(dice);

  const canvas = h("canvas", { class: "wb-crisp", width: 64, height: 64, hidden: true });
  const preview = h("div", { class: "controls-preview wb-void", role: "img", "aria-label": "Live preview" }, canvas);
  const source = promptField("source", "What the activation comes from");
  const target = promptField("target", "What it is put into");
  const bar = h("div", { class: "controls-bar" });
  const track = h("div", { class: "controls-track", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0 }, bar);
  const error = h("div", { class: "wb-problem", role: "alert", hidden: true });

  root.append(
    h("header", { class: "wb-head controls-head" },
      h("div", { class: "controls-name" }, name, scheduler),
      h("div", { class: "controls-numbers" }, ...fields),
      complaint, h("div", { class: "wb-end" }, state, run, stop)),
    track,
    h("div", { class: "controls-body" }, preview, h("div", { class: "controls-prompts" }, source, target)),
    error,
  );

  function put<K extends keyof State & string>(key: K, value: State[K]): void {
    model.set(key, value);
    save();
  }

  function numberField(key: NumberName): HTMLElement {
    const rule = RULES[key];
    const id = uniqueId(key);
    const input = h("input", { id, class: "wb-field", inputmode: rule.whole ? "numeric" : "decimal", autocomplete: "off", "data-name": key });
    input.style.width = rule.width;
    input.addEventListener("input", () => {
      const why = refusal(rule, input.value);
      input.setAttribute("aria-invalid", String(why !== ""));
      if (why) refused.set(key, why);
      else {
        refused.delete(key);
        put(key, Number(input.value));
      }
      showStatus();
    });
    input.addEventListener("keydown", (event) => {
      const move = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!move || refused.has(key)) return;
      event.preventDefault();
      const size = rule.whole ? 1 : 0.5;
      put(key, Math.min(rule.most, Math.max(rule.least, Number(input.value) + move * size)));
    });
    panel.watch([key], () => {
      if (document.activeElement === input && Number(input.value) === model.get(key)) return;
      const value = model.get(key);
      input.value = !rule.whole && Number.isInteger(value) ? value.toFixed(1) : String(value);
      input.setAttribute("aria-invalid", "false");
      refused.delete(key);
    });
    return h("div", { class: "controls-number" }, h("label", { for: id, class: "wb-muted" }, rule.label), input);
  }

  function promptField(key: "source" | "target", hint: string): HTMLElement {
    const id = uniqueId(key);
    const area = h("textarea", { id, class: "wb-field", rows: 1, spellcheck: "false", placeholder: "A prompt", "data-name": key, title: hint });
    area.addEventListener("input", () => {
      put(key, area.value);
      grow(area);
    });
    panel.watch([key], () => {
      if (area.value !== model.get(key)) area.value = model.get(key) ?? "";
      requestAnimationFrame(() => grow(area));
    });
    return h("div", { class: "controls-prompt" }, h("label", { for: id, class: "wb-muted" }, key), area);
  }

  function start(): void {
    if (run.disabled || run.hidden) return;
    model.save_changes();
    model.send({ kind: "run" });
  }

  function showStatus(): void {
    const status = model.get("status");
    const active = status === "running" || status === "stopping";
    run.hidden = active;
    stop.hidden = !active;
    stop.disabled = status === "stopping";
    stop.lastChild!.textContent = status === "stopping" ? "Stopping" : "Stop";
    run.disabled = panel.saved || refused.size > 0;
    setText(complaint, [...refused.values()][0] ?? "");
    root.dataset["status"] = status;
    showProgress();
    const guidance = root.querySelector<HTMLInputElement>('[data-name="guidance"]')!;
    guidance.disabled = panel.saved || !model.get("can_guide");
    guidance.title = model.get("can_guide") ? "" : "This pipeline has no guidance";
  }

  function showProgress(): void {
    const { label = "", step = 0, of = 0, rate, left } = model.get("progress") ?? {};
    const status = model.get("status");
    const active = status === "running" || status === "stopping";
    const known = of > 0;
    track.classList.toggle("active", active);
    track.classList.toggle("unknown", active && !known);
    track.setAttribute("aria-valuemax", String(of || 1));
    track.setAttribute("aria-valuenow", String(step));
    bar.style.width = active && known ? `${(100 * step) / of}%` : "0";
    const parts = [
      label, known ? `${step} of ${of}` : "", rate ? speed(rate) : "",
      left !== null && left !== undefined ? `${duration(left)} left` : "",
    ];
    const idle = panel.saved ? "saved page, no kernel" : status === "done" ? "done" : "";
    setText(state, active ? parts.filter(Boolean).join(" · ") || "starting" : idle);
  }

  function showError(): void {
    const { title = "", text = "" } = model.get("error") ?? {};
    error.hidden = !title && !text;
    const dismiss = iconButton("close", "Dismiss", () => {
      error.hidden = true;
      model.send({ kind: "dismiss" });
    });
    error.replaceChildren(h("div", {}, h("b", {}, title || "Something went wrong"), h("pre", {}, text)), dismiss);
  }

  let latest = 0;
  async function showPreview(): Promise<void> {
    const mine = ++latest;
    const picture = await decode(model.get("preview")).catch(() => null);
    if (mine !== latest) return;
    canvas.hidden = !picture;
    if (!picture) return;
    canvas.width = picture.width;
    canvas.height = picture.height;
    drawPicture(canvas.getContext("2d")!, picture);
    picture.close();
  }

  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    }
  });
  panel.watch(["model_name", "scheduler"], () => {
    setText(name, model.get("model_name") || "No model");
    setText(scheduler, model.get("scheduler"));
    name.title = model.get("model_name");
  });
  panel.watch(["status", "can_guide"], showStatus);
  panel.watch(["progress"], showProgress);
  panel.watch(["error"], showError);
  panel.watch(["preview"], () => void showPreview());
  if (panel.saved) {
    for (const input of root.querySelectorAll<HTMLInputElement>(".wb-field")) input.readOnly = true;
    dice.disabled = true;
  }
}

function grow(area: HTMLTextAreaElement): void {
  area.style.height = "24px";
  area.style.height = `${Math.min(72, Math.max(24, area.scrollHeight + 2))}px`;
}

export default widget<State>("controls", "Run controls", css, build);
