/** The frame every widget stands in: root, styles, busy bar, problem box, and the ties to its model. */

import type { AnyModel, RenderProps } from "@anywidget/types";

import { h, setText } from "./dom";
import theme from "./theme.css";

/** Traits every widget has. */
export interface ElementState {
  working: boolean;
  problem: string;
  /** True in a page without a kernel: nothing can run. */
  _saved?: boolean;
}

export interface Panel<T extends ElementState> {
  root: HTMLElement;
  model: AnyModel<T>;
  signal: AbortSignal;
  saved: boolean;
  /** Calls `update` now and whenever one of the traits changes, until the view is gone. */
  watch(names: (keyof T & string)[], update: () => void): void;
  /** Says something to a screen reader. */
  announce(text: string): void;
}

type Build<T extends ElementState> = (panel: Panel<T>) => void | (() => void);

/** Turns a function that fills a panel into an anywidget `render`. */
export function widget<T extends ElementState>(name: string, label: string, css: string, build: Build<T>) {
  return { render: (props: RenderProps<T>) => mount(props, name, label, css, build) };
}

function mount<T extends ElementState>(
  { model, el }: RenderProps<T>,
  name: string,
  label: string,
  css: string,
  build: Build<T>,
): () => void {
  const gone = new AbortController();
  const live = h("div", { class: "wb-sr", "aria-live": "polite" });
  const root = h("section", { class: `wb wb-${name}`, "aria-label": label, "data-widget": name });
  const panel: Panel<T> = {
    root,
    model,
    signal: gone.signal,
    saved: Boolean(model.get("_saved")),
    watch: (names, update) => watch(model, names, update, gone.signal),
    announce: (text) => setText(live, text),
  };
  el.classList.add("wb-host");
  el.append(h("style", {}, theme + css), root);
  keepKeys(root);
  const dispose = build(panel);
  root.append(live);
  showState(panel);
  return () => {
    gone.abort();
    dispose?.();
    root.remove();
  };
}

function watch<T extends ElementState>(
  model: AnyModel<T>,
  names: (keyof T & string)[],
  update: () => void,
  signal: AbortSignal,
): void {
  for (const name of names) {
    model.on(`change:${name}`, update);
    signal.addEventListener("abort", () => model.off(`change:${name}`, update));
  }
  update();
}

/** Plain keys stay in the widget: in JupyterLab's command mode "d d" would delete the cell. */
function keepKeys(root: HTMLElement): void {
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") event.stopPropagation();
  });
}

function showState<T extends ElementState>({ root, watch: follow, model }: Panel<T>): void {
  const bar = h("div", { class: "wb-busy", hidden: true });
  const text = h("pre", {});
  const box = h("div", { class: "wb-problem", role: "alert", hidden: true }, h("div", {}, text));
  root.append(bar);
  root.append(box);
  follow(["working", "problem"], () => {
    const busy = Boolean(model.get("working"));
    bar.hidden = !busy;
    root.setAttribute("aria-busy", String(busy));
    const problem = model.get("problem") ?? "";
    box.hidden = problem === "";
    setText(text, problem);
  });
}
