/** The rows of the tree that are in view; of three thousand only some dozens are elements. */

import { onResize } from "./lib/canvas";
import { copyButton } from "./lib/clipboard";
import { glyph, h, uniqueId } from "./lib/dom";
import { bytes, count } from "./lib/format";
import { perFrame } from "./lib/timing";
import type { Row, TreeNode } from "./tree_model";

const ROW = 24;
const SPARE = 8;
const INDENT = 12;
const HEIGHT_BEFORE_LAYOUT = 480;

export interface Look {
  active: string;
  selected: string;
  query: string;
  marked: ReadonlySet<string>;
}

export class Rows {
  private readonly list = h("div", { class: "tree-rows", role: "none" });
  readonly element = h("div", { class: "tree-scroll", role: "tree", tabindex: "0", "aria-label": "Components" }, this.list);
  readonly draw = perFrame(() => this.drawNow());
  private readonly id = uniqueId("tree");
  private rows: readonly Row[] = [];

  constructor(
    private readonly look: () => Look,
    private readonly code: (path: string) => string,
    private readonly announce: (text: string) => void,
    signal: AbortSignal,
  ) {
    this.element.addEventListener("scroll", this.draw, { passive: true });
    onResize(this.element, this.draw, signal);
  }

  show(rows: readonly Row[]): void {
    this.rows = rows;
    this.list.style.height = `${rows.length * ROW}px`;
    this.element.hidden = rows.length === 0;
    this.draw();
  }

  /** How many rows a page is. */
  get page(): number {
    return Math.max(1, Math.floor(this.element.clientHeight / ROW) - 1);
  }

  intoView(path: string): void {
    const here = this.rows.findIndex((row) => row.node.path === path);
    if (here < 0) return;
    const top = here * ROW;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.element.scrollTop = top + ROW - clientHeight;
  }

  private drawNow(): void {
    const look = this.look();
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - SPARE);
    const last = Math.ceil((scrollTop + (clientHeight || HEIGHT_BEFORE_LAYOUT)) / ROW) + SPARE;
    this.list.replaceChildren(...this.rows.slice(first, last).map((row, i) => this.row(row, first + i, look)));
    const here = this.rows.findIndex((row) => row.node.path === look.active);
    if (here >= 0) this.element.setAttribute("aria-activedescendant", `${this.id}-${here}`);
    else this.element.removeAttribute("aria-activedescendant");
  }

  private row({ node, hasChildren, unfolded }: Row, i: number, look: Look): HTMLElement {
    const row = h(
      "div",
      {
        id: `${this.id}-${i}`, class: "tree-row", role: "treeitem", title: `${node.path}\n${node.cls}`,
        "data-path": node.path, "data-kind": node.kind, "aria-level": node.depth + 1,
        "aria-selected": String(node.path === look.selected), "aria-expanded": hasChildren ? String(unfolded) : null,
      },
      h("span", { class: "tree-indent", style: `width:${node.depth * INDENT}px` }),
      h("span", { class: "tree-twisty" }, hasChildren && glyph(unfolded ? "down" : "next")),
      h("span", { class: "tree-name" }, ...highlight(node.name, look.query)),
      h("span", { class: "tree-class wb-clip" }, node.cls),
      h("span", { class: "tree-shape wb-mono wb-clip" }, node.shape),
      look.marked.has(node.path) && h("span", { class: "tree-dot", title: "captured or patched" }),
      h("span", { class: "tree-count", title: memory(node) }, node.parameters ? count(node.parameters) : ""),
      this.copy(node.path),
    );
    row.classList.toggle("active", node.path === look.active);
    row.style.top = `${i * ROW}px`;
    return row;
  }

  private copy(path: string): HTMLElement {
    const button = copyButton(`Copy ${this.code(path)}`, () => this.code(path), this.announce);
    button.classList.add("tree-copy");
    button.tabIndex = -1;
    return button;
  }
}

const WIDTHS = { float32: 4, bfloat16: 2, float16: 2, int8: 1 };

/** What the parameters take up, a dtype a line. */
function memory({ parameters, dtype, device }: TreeNode): string | null {
  if (!parameters) return null;
  const now = device === "meta" ? "not loaded" : `now, on ${device}`;
  const line = ([name, width]: [string, number]): string =>
    `${bytes(parameters * width)} as ${name}${name === dtype ? ` (${now})` : ""}`;
  return Object.entries(WIDTHS).map(line).join("\n");
}

/** The name with the part that was searched for marked. */
function highlight(name: string, query: string): (Node | string)[] {
  const lower = name.toLowerCase();
  const word = query.toLowerCase().split(/\s+/).find((part) => part && lower.includes(part));
  if (!word) return [name];
  const start = lower.indexOf(word);
  const end = start + word.length;
  return [name.slice(0, start), h("mark", {}, name.slice(start, end)), name.slice(end)];
}
