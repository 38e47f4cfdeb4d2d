/** The fields of the run controls: numbers that say at once what does not fit, prompts that grow. */

import { h, setText, uniqueId } from "./lib/dom";

export type NumberName = "seed" | "steps" | "guidance" | "source_from" | "source_seed";

export interface NumberRule {
  label: string;
  least: number;
  most: number;
  whole: boolean;
  width: string;
}

/** The same limits as the traits of RunControls in Python. */
export const RULES: Record<NumberName, NumberRule> = {
  seed: { label: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, width: "96px" },
  steps: { label: "Steps", least: 1, most: 1000, whole: true, width: "56px" },
  guidance: { label: "Guidance", least: 0, most: 100, whole: false, width: "56px" },
  source_seed: { label: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, width: "96px" },
  source_from: { label: "from step", least: 0, most: 999, whole: true, width: "44px" },
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

export class NumberField {
  readonly input: HTMLInputElement;
  readonly element: HTMLElement;
  /** Why the field's text does not fit; "" while it does. */
  refused = "";

  constructor(readonly name: NumberName, private readonly put: (value: number) => void, private readonly changed: () => void) {
    const rule = RULES[name];
    const id = uniqueId(name);
    this.input = h("input", { id, class: "wb-field", inputmode: rule.whole ? "numeric" : "decimal", autocomplete: "off" });
    this.input.style.width = rule.width;
    this.element = h("div", { class: "controls-number" }, h("label", { for: id, class: "wb-muted" }, rule.label), this.input);
    this.input.addEventListener("input", () => this.read());
    this.input.addEventListener("keydown", (event) => this.nudge(event));
  }

  /** Shows the model's value, unless the reader is typing that very number. */
  show(value: number | null): void {
    if (value === null) return;
    if (document.activeElement === this.input && Number(this.input.value) === value) return;
    this.input.value = !RULES[this.name].whole && Number.isInteger(value) ? value.toFixed(1) : String(value);
    this.accept();
  }

  /** Lets the number be changed, or says why it cannot be. */
  allow(can: boolean, why: string): void {
    this.input.disabled = !can;
    this.input.title = can ? "" : why;
  }

  private accept(): void {
    this.refused = "";
    this.input.setAttribute("aria-invalid", "false");
    this.changed();
  }

  private read(): void {
    const why = refusal(RULES[this.name], this.input.value);
    if (!why) {
      this.accept();
      this.put(Number(this.input.value));
      return;
    }
    this.refused = why;
    this.input.setAttribute("aria-invalid", "true");
    this.changed();
  }

  private nudge(event: KeyboardEvent): void {
    const move = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!move || this.refused || this.input.readOnly) return;
    event.preventDefault();
    const { least, most, whole } = RULES[this.name];
    this.put(Math.min(most, Math.max(least, Number(this.input.value) + move * (whole ? 1 : 0.5))));
  }
}

const LINE = 24;
const MOST_LINES = 72;

export class PromptField {
  readonly area: HTMLTextAreaElement;
  readonly element: HTMLElement;

  constructor(label: string, hint: string, put: (text: string) => void) {
    const id = uniqueId(label);
    this.area = h("textarea", { id, class: "wb-field", rows: 1, spellcheck: "false", placeholder: "A prompt", title: hint });
    this.element = h("div", { class: "controls-prompt" }, h("label", { for: id, class: "wb-muted" }, label), this.area);
    this.area.addEventListener("input", () => {
      put(this.area.value);
      this.grow();
    });
  }

  show(text: string): void {
    if (this.area.value !== text) this.area.value = text;
    requestAnimationFrame(() => this.grow());
  }

  private grow(): void {
    this.area.style.height = `${LINE}px`;
    this.area.style.height = `${Math.min(MOST_LINES, Math.max(LINE, this.area.scrollHeight + 2))}px`;
  }
}

/** The error box: what went wrong, in full, until it is dismissed. */
export class ErrorBox {
  private readonly title = h("b");
  private readonly text = h("pre");
  readonly element: HTMLElement;

  constructor(dismiss: HTMLElement) {
    this.element = h("div", { class: "wb-problem", role: "alert", hidden: true }, h("div", {}, this.title, this.text), dismiss);
  }

  show(title: string, text: string): void {
    this.element.hidden = !title && !text;
    setText(this.title, title || "Something went wrong");
    setText(this.text, text);
  }
}
