/** CodeView: the code of what is on screen, to copy or export. */

import { copyButton } from "./lib/clipboard";
import { empty, h, setText, textButton } from "./lib/dom";
import { type ElementState, type Panel, widget } from "./lib/panel";
import css from "./code.css";
import { tokens } from "./code_tokens";

interface State extends ElementState {
  code: string;
  filename: string;
  status: string;
  formats: string[];
  can_open: boolean;
}

function build(panel: Panel<State>): void {
  const { root, model } = panel;
  const filename = h("span", { class: "wb-mono wb-muted wb-clip" });
  const status = h("span", { class: "code-status wb-muted wb-clip", role: "status" });
  const formats = h("select", { class: "wb-select", "aria-label": "Export format" });
  const run = textButton("Export", () => model.send({ kind: "export", format: formats.value }));
  const file = h("input", { type: "file", class: "code-file", accept: ".py,.ipynb,.json", hidden: "", "aria-label": "Experiment to open" });
  file.addEventListener("change", () => {
    const chosen = file.files?.[0];
    file.value = "";
    if (chosen) void chosen.text().then((text) => model.send({ kind: "open", name: chosen.name, text }));
  });
  const open = textButton("Open", () => file.click());
  open.title = "Open an experiment: JSON, or a script or notebook that was exported";
  const copy = copyButton("Copy the code", () => model.get("code"), panel.announce);
  const lines = h("div", { class: "code-lines wb-mono", "aria-hidden": "true" });
  const code = h("code");
  const view = h("div", { class: "code-view", tabindex: "0", role: "region", "aria-label": "Python code" }, lines, h("pre", { class: "code-pre wb-mono" }, code));
  const nothing = empty("No code yet", "Run, or click a cell, and the code that does the same appears here.");
  root.append(
    h("header", { class: "wb-head" }, h("span", { class: "wb-title" }, "Code"), filename, h("div", { class: "wb-end" }, status, file, open, formats, run, copy)),
    nothing, view,
  );

  panel.watch(["code"], () => {
    const text = model.get("code") ?? "";
    nothing.hidden = text !== "";
    view.hidden = text === "";
    copy.disabled = text === "";
    code.replaceChildren(...tokens(text).map(({ kind, text: part }) => (kind === "plain" ? document.createTextNode(part) : h("span", { class: `py-${kind}` }, part))));
    const count = text.replace(/\n$/, "").split("\n").length;
    setText(lines, Array.from({ length: count }, (_, i) => i + 1).join("\n"));
  });
  panel.watch(["can_open"], () => { open.hidden = panel.saved || !model.get("can_open"); });
  panel.watch(["filename"], () => setText(filename, model.get("filename") ?? ""));
  panel.watch(["status"], () => {
    setText(status, model.get("status") ?? "");
    status.title = model.get("status") ?? "";
  });
  panel.watch(["formats", "code"], () => {
    const names = model.get("formats") ?? [];
    const before = formats.value;
    formats.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    if (names.includes(before)) formats.value = before;
    formats.hidden = names.length < 2;
    run.hidden = names.length === 0;
    run.disabled = panel.saved || model.get("code") === "";
    run.title = panel.saved ? "A saved page has no kernel to export with; copy instead" : "";
  });
}

export default widget<State>("code", "Code", css, build);
