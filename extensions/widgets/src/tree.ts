/** ComponentTree: the modules of a pipeline, searchable, folded, fast with thousands of nodes. */

import { onResize } from "./lib/canvas";
import { copyButton, copyText } from "./lib/clipboard";
import { empty, glyph, h, setText, uniqueId } from "./lib/dom";
import { count } from "./lib/format";
import { type ElementState, type Panel, widget } from "./lib/panel";
import { perFrame, throttle } from "./lib/timing";
import css from "./tree.css";
import { accessCode, type Row, Tree, type TreeNode } from "./tree_model";

interface State extends ElementState {
  nodes: TreeNode[];
  variable: string;
  selected: string;
  marked: string[];
}

const ROW = 24;
const SPARE = 8;

function build(panel: Panel<State>): void {
  const { root, model } = panel;
  let tree = new Tree([]);
  let rows: Row[] = [];
  let query = "";
  let marked = new Set<string>();
  let active = model.get("selected");
  const id = uniqueId("tree");

  const total = h("span", { class: "wb-muted" });
  const search = h("input", {
    class: "wb-field", type: "search", placeholder: "Filter", spellcheck: "false", autocomplete: "off",
    "aria-label": "Filter components by path or class",
  });
  const found = h("span", { class: "wb-muted tree-found" });
  const list = h("div", { class: "tree-rows", role: "none" });
  const scroll = h("div", { class: "tree-scroll", role: "tree", tabindex: "0", "aria-label": "Components" }, list);
  const nothing = empty("No model", "Load one to see its components.");
  const none = empty("No match", "Filter by part of a path or a class.");
  const detail = h("footer", { class: "tree-detail", hidden: true });
  root.append(
    h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Components"), h("div", { class: "wb-end" }, total)),
    h("div", { class: "tree-search" }, glyph("search"), search, found),
    scroll, nothing, none, detail,
  );

  const save = throttle(() => model.save_changes(), 100);
  const draw = perFrame(drawRows);

  function refresh(): void {
    const result = tree.rows(query);
    rows = result.rows;
    list.style.height = `${rows.length * ROW}px`;
    setText(found, query ? String(result.matches) : "");
    nothing.hidden = tree.nodes.length > 0;
    none.hidden = rows.length > 0 || tree.nodes.length === 0;
    scroll.hidden = rows.length === 0;
    draw();
  }

  function drawRows(): void {
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
    const last = Math.min(rows.length, Math.ceil((scroll.scrollTop + (scroll.clientHeight || 480)) / ROW) + SPARE);
    const shown: HTMLElement[] = [];
    for (let i = first; i < last; i++) shown.push(rowElement(i));
    list.replaceChildren(...shown);
    const here = rows.findIndex((row) => row.node.path === active);
    if (here >= 0) scroll.setAttribute("aria-activedescendant", `${id}-${here}`);
    else scroll.removeAttribute("aria-activedescendant");
  }

  function rowElement(i: number): HTMLElement {
    const { node, hasChildren, unfolded } = rows[i]!;
    const selected = node.path === model.get("selected");
    const twisty = h("span", { class: "tree-twisty" }, hasChildren && glyph(unfolded ? "down" : "next"));
    const row = h(
      "div",
      {
        id: `${id}-${i}`, class: "tree-row", role: "treeitem", "data-path": node.path, "data-kind": node.kind,
        "aria-level": node.depth + 1, "aria-selected": String(selected), "aria-expanded": hasChildren ? String(unfolded) : null,
        title: `${node.path}\n${node.cls}`,
      },
      h("span", { class: "tree-indent", style: `width:${node.depth * 12}px` }),
      twisty,
      h("span", { class: "tree-name" }, ...highlight(node.name, query)),
      h("span", { class: "tree-class wb-clip" }, node.cls),
      h("span", { class: "tree-shape wb-mono wb-clip" }, node.shape),
      marked.has(node.path) && h("span", { class: "tree-dot", title: "captured or patched" }),
      h("span", { class: "tree-count" }, node.parameters ? count(node.parameters) : ""),
    );
    row.classList.toggle("active", node.path === active);
    row.style.top = `${i * ROW}px`;
    const copy = copyButton(`Copy ${accessCode(model.get("variable"), node.path)}`, () => accessCode(model.get("variable"), node.path), panel.announce);
    copy.classList.add("tree-copy");
    copy.tabIndex = -1;
    row.append(copy);
    return row;
  }

  function select(path: string): void {
    active = path;
    model.set("selected", path);
    save();
    showDetail();
    draw();
  }

  function fold(path: string, unfold: boolean): void {
    if (query) return;
    if (unfold) tree.unfolded.add(path);
    else tree.unfolded.delete(path);
    refresh();
  }

  function showDetail(): void {
    const node = tree.nodes.find((item) => item.path === model.get("selected"));
    detail.hidden = !node;
    if (!node) return;
    const code = accessCode(model.get("variable"), node.path);
    const facts = [node.parameters ? `${count(node.parameters)} parameters` : "", node.dtype, node.device];
    detail.replaceChildren(
      h("div", { class: "tree-code" }, h("code", { class: "wb-mono", title: code }, code), copyButton("Copy code", () => code, panel.announce)),
      h("div", { title: node.cls }, node.cls),
      h("div", { class: "wb-muted" }, facts.filter(Boolean).join(" · ")),
    );
    if (node.shape) detail.append(h("div", { class: "wb-muted" }, "output ", h("span", { class: "wb-mono" }, node.shape)));
  }

  function intoView(path: string): void {
    const here = rows.findIndex((row) => row.node.path === path);
    if (here < 0) return;
    const top = here * ROW;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    else if (top + ROW > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + ROW - scroll.clientHeight;
  }

  function step(key: string): string | undefined {
    const here = rows.findIndex((row) => row.node.path === active);
    const row = rows[here];
    const at = (i: number): string | undefined => rows[Math.max(0, Math.min(rows.length - 1, i))]?.node.path;
    const page = Math.max(1, Math.floor(scroll.clientHeight / ROW) - 1);
    if (key === "ArrowDown") return at(here + 1);
    if (key === "ArrowUp") return at(here - 1);
    if (key === "PageDown") return at(here + page);
    if (key === "PageUp") return at(here - page);
    if (key === "Home") return at(0);
    if (key === "End") return at(rows.length - 1);
    if (key === "ArrowRight" && row?.hasChildren) {
      if (row.unfolded) return at(here + 1);
      fold(row.node.path, true);
    }
    if (key === "ArrowLeft" && row) {
      if (row.unfolded && !query) fold(row.node.path, false);
      else return row.node.path.includes(".") ? parentOf(row.node, here) : undefined;
    }
    return undefined;
  }

  function parentOf(node: TreeNode, here: number): string | undefined {
    for (let i = here - 1; i >= 0; i--) if (rows[i]!.node.depth < node.depth) return rows[i]!.node.path;
    return undefined;
  }

  scroll.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "c" && active) void copyText(accessCode(model.get("variable"), active)).then(() => panel.announce("copied"));
    if (event.key === "/") search.focus();
    if (event.key === "Enter" || event.key === " ") {
      const row = rows.find((item) => item.node.path === active);
      if (row?.hasChildren) fold(active, !row.unfolded);
    }
    const next = step(event.key);
    if (next !== undefined) {
      select(next);
      intoView(next);
    }
    if (/^(Arrow|Home|End|Page|Enter| |\/)/.test(event.key)) event.preventDefault();
  });
  scroll.addEventListener("click", (event) => {
    const target = event.target as Element;
    const row = target.closest<HTMLElement>(".tree-row");
    const path = row?.dataset["path"];
    if (path === undefined || target.closest(".tree-copy")) return;
    if (target.closest(".tree-twisty")) fold(path, row!.getAttribute("aria-expanded") !== "true");
    else select(path);
  });
  scroll.addEventListener("dblclick", (event) => {
    const row = (event.target as Element).closest<HTMLElement>(".tree-row");
    if (row?.hasAttribute("aria-expanded")) fold(row.dataset["path"]!, row.getAttribute("aria-expanded") !== "true");
  });
  scroll.addEventListener("scroll", draw, { passive: true });
  search.addEventListener("input", () => {
    query = search.value.trim();
    if (!query && active) tree.reveal(active);
    refresh();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      search.value = query = "";
      refresh();
    } else if (event.key === "ArrowDown" && rows.length) {
      event.preventDefault();
      scroll.focus();
      if (!rows.some((row) => row.node.path === active)) select(rows[0]!.node.path);
    }
  });
  onResize(scroll, draw, panel.signal);

  panel.watch(["nodes"], () => {
    tree = new Tree(model.get("nodes"), tree.nodes.length ? tree.unfolded : undefined);
    const sum = tree.nodes.reduce((all, node) => all + (node.depth === 0 ? node.parameters : 0), 0);
    setText(total, sum ? count(sum) : "");
    showDetail();
    refresh();
  });
  panel.watch(["marked"], () => {
    marked = new Set(model.get("marked"));
    draw();
  });
  panel.watch(["selected", "variable"], () => {
    const path = model.get("selected");
    if (path !== active) {
      active = path;
      tree.reveal(path);
      refresh();
      intoView(path);
    }
    showDetail();
    draw();
  });
}

function highlight(name: string, query: string): (Node | string)[] {
  const word = query.toLowerCase().split(/\s+/).find((part) => part && name.toLowerCase().includes(part));
  if (!word) return [name];
  const start = name.toLowerCase().indexOf(word);
  return [name.slice(0, start), h("mark", {}, name.slice(start, start + word.length)), name.slice(start + word.length)];
}

export default widget<State>("tree", "Component tree", css, build);
