/** ComponentTree: the modules of a pipeline, searchable, folded, fast with thousands of nodes. */

import { copyButton, copyText } from "./lib/clipboard";
import { empty, glyph, h, setText } from "./lib/dom";
import { count } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { throttle } from "./lib/timing";
import css from "./tree.css";
import { accessCode, type Row, Tree, type TreeNode } from "./tree_model";
import { Rows } from "./tree_rows";

interface State extends ElementState {
  nodes: TreeNode[];
  variable: string;
  selected: string;
  marked: string[];
}

class ComponentTree {
  private tree = new Tree([]);
  private rows: Row[] = [];
  private query = "";
  private marked = new Set<string>();
  private active = "";

  private readonly save = throttle(() => this.model.save_changes(), 100);
  private readonly total = h("span", { class: "wb-muted" });
  private readonly search = h("input", {
    class: "wb-field", type: "search", placeholder: "Filter", spellcheck: "false", autocomplete: "off",
    "aria-label": "Filter components by path or class",
  });
  private readonly found = h("span", { class: "wb-muted tree-found" });
  private readonly nothing = empty("No model", "Load one to see its components.");
  private readonly none = empty("No match", "Filter by part of a path or a class.");
  private readonly detail = h("footer", { class: "tree-detail", hidden: true });
  private readonly list: Rows;

  constructor(private readonly panel: Panel<State>) {
    const look = () => ({ active: this.active, selected: this.model.get("selected"), query: this.query, marked: this.marked });
    this.list = new Rows(look, (path) => this.code(path), panel.announce, panel.signal);
    const head = h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Components"), h("div", { class: "wb-end" }, this.total));
    const search = h("div", { class: "tree-search" }, glyph("search"), this.search, this.found);
    panel.root.append(head, search, this.list.element, this.nothing, this.none, this.detail);
    this.listenToRows();
    this.listenToSearch();
    panel.watch(["nodes"], () => this.showNodes());
    panel.watch(["marked"], () => {
      this.marked = new Set(this.model.get("marked"));
      this.list.draw();
    });
    panel.watch(["selected", "variable"], () => this.showSelected());
  }

  private get model(): Panel<State>["model"] {
    return this.panel.model;
  }

  private code(path: string): string {
    return accessCode(this.model.get("variable"), path);
  }

  private showNodes(): void {
    this.tree = new Tree(this.model.get("nodes"), this.tree.nodes.length ? this.tree.unfolded : undefined);
    const sum = this.tree.nodes.reduce((all, node) => all + (node.depth === 0 ? node.parameters : 0), 0);
    setText(this.total, sum ? count(sum) : "");
    this.showDetail();
    this.refresh();
  }

  private showSelected(): void {
    const path = this.model.get("selected");
    if (path !== this.active) {
      this.active = path;
      this.tree.reveal(path);
      this.refresh();
      this.list.intoView(path);
    }
    this.showDetail();
    this.list.draw();
  }

  private refresh(): void {
    const { rows, matches } = this.tree.rows(this.query);
    this.rows = rows;
    setText(this.found, this.query ? String(matches) : "");
    this.nothing.hidden = this.tree.nodes.length > 0;
    this.none.hidden = rows.length > 0 || this.tree.nodes.length === 0;
    this.list.show(rows);
  }

  private showDetail(): void {
    const node = this.tree.nodes.find((item) => item.path === this.model.get("selected"));
    this.detail.hidden = !node;
    if (!node) return;
    const code = this.code(node.path);
    const facts = [node.parameters ? `${count(node.parameters)} parameters` : "", node.dtype, node.device];
    this.detail.replaceChildren(
      h("div", { class: "tree-code" }, h("code", { class: "wb-mono", title: code }, code), copyButton("Copy code", () => code, this.panel.announce)),
      h("div", { title: node.cls }, node.cls),
      h("div", { class: "wb-muted" }, facts.filter(Boolean).join(" · ")),
    );
    if (node.shape) this.detail.append(h("div", { class: "wb-muted" }, "output ", h("span", { class: "wb-mono" }, node.shape)));
  }

  private select(path: string): void {
    this.active = path;
    this.model.set("selected", path);
    this.save();
    this.showDetail();
    this.list.draw();
  }

  /** While searching nothing folds: every match stays in sight. */
  private fold(path: string, unfold: boolean): void {
    if (this.query) return;
    if (unfold) this.tree.unfolded.add(path);
    else this.tree.unfolded.delete(path);
    this.refresh();
  }

  private listenToRows(): void {
    const { element } = this.list;
    element.addEventListener("keydown", (event) => this.onKey(event));
    element.addEventListener("click", (event) => {
      const target = event.target as Element;
      const row = target.closest<HTMLElement>(".tree-row");
      if (!row || target.closest(".tree-copy")) return;
      if (target.closest(".tree-twisty")) this.toggle(row);
      else this.select(row.dataset["path"]!);
    });
    element.addEventListener("dblclick", (event) => {
      const row = (event.target as Element).closest<HTMLElement>(".tree-row[aria-expanded]");
      if (row) this.toggle(row);
    });
  }

  private toggle(row: HTMLElement): void {
    this.fold(row.dataset["path"]!, row.getAttribute("aria-expanded") !== "true");
  }

  private listenToSearch(): void {
    const input = (value: string): void => {
      this.query = value;
      if (!value && this.active) this.tree.reveal(this.active);
      this.refresh();
    };
    this.search.addEventListener("input", () => input(this.search.value.trim()));
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        this.search.value = "";
        input("");
      } else if (event.key === "ArrowDown" && this.rows.length) {
        event.preventDefault();
        this.list.element.focus();
        if (!this.rows.some((row) => row.node.path === this.active)) this.select(this.rows[0]!.node.path);
      }
    });
  }

  private onKey(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    if (/^(Arrow|Home|End|Page|Enter| |\/)/.test(key)) event.preventDefault();
    const here = this.rows.findIndex((row) => row.node.path === this.active);
    if (key === "/") this.search.focus();
    else if (key === "c" && this.active) void copyText(this.code(this.active)).then(() => this.panel.announce("copied"));
    else if (key === "Enter" || key === " ") this.foldAt(here);
    else {
      const next = this.reached(key, here);
      if (!next) return;
      this.select(next.node.path);
      this.list.intoView(next.node.path);
    }
  }

  private foldAt(here: number): void {
    const row = this.rows[here];
    if (row?.hasChildren) this.fold(row.node.path, !row.unfolded);
  }

  /** The row that a key leads to; left and right fold before they move. */
  private reached(key: string, here: number): Row | undefined {
    const moves: Record<string, number> = {
      ArrowDown: here + 1, ArrowUp: here - 1, PageDown: here + this.list.page, PageUp: here - this.list.page,
      Home: 0, End: this.rows.length - 1,
    };
    const to = moves[key];
    if (to !== undefined) return this.rows[Math.max(0, Math.min(this.rows.length - 1, to))];
    const row = this.rows[here];
    if (key === "ArrowRight" && row?.hasChildren) {
      if (row.unfolded) return this.rows[here + 1];
      this.fold(row.node.path, true);
    } else if (key === "ArrowLeft" && row) {
      if (!row.unfolded || this.query) return this.rows.slice(0, here).findLast((other) => other.node.depth < row.node.depth);
      this.fold(row.node.path, false);
    }
    return undefined;
  }
}

export default widget<State>("tree", "Component tree", css, (panel) => void new ComponentTree(panel));
