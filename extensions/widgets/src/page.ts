/** Runs widgets in a saved page: the same bundles over embedded state, no kernel, no network. */

interface Saved {
  bundles: Record<string, string>;
  /** Rows of widgets, top to bottom. */
  rows: { bundle: string; width: string; state: Record<string, unknown>; buffers: [(string | number)[], string][] }[][];
}

type Listener = (...args: unknown[]) => void;

/** What a widget sees of its model, without a kernel behind it. */
class SavedModel {
  private readonly listeners = new Map<string, Set<Listener>>();

  constructor(private readonly state: Record<string, unknown>) {}

  get(name: string): unknown {
    return this.state[name];
  }

  set(name: string, value: unknown): void {
    if (Object.is(this.state[name], value)) return;
    this.state[name] = value;
    for (const listener of [...(this.listeners.get(`change:${name}`) ?? [])]) listener();
    for (const listener of [...(this.listeners.get("change") ?? [])]) listener();
  }

  on(event: string, listener: Listener): void {
    const known = this.listeners.get(event) ?? new Set();
    this.listeners.set(event, known.add(listener));
  }

  off(event: string, listener: Listener): void {
    this.listeners.get(event)?.delete(listener);
  }

  save_changes(): void {}

  /** Messages have nobody to go to; the last ones are kept where a test can read them. */
  readonly sent: unknown[] = [];
  send(content: unknown): void {
    this.sent.push(content);
  }
}

function fromBase64(text: string): DataView {
  return new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

function putBuffers(state: Record<string, unknown>, buffers: [(string | number)[], string][]): void {
  for (const [path, text] of buffers) {
    let place = state as Record<string | number, unknown>;
    for (const key of path.slice(0, -1)) place = place[key] as Record<string | number, unknown>;
    place[path.at(-1)!] = fromBase64(text);
  }
}

async function main(): Promise<void> {
  const saved = JSON.parse(document.getElementById("wb-saved")!.textContent!) as Saved;
  const modules = new Map<string, { default: { render(props: unknown): void } }>();
  for (const [name, source] of Object.entries(saved.bundles)) {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    modules.set(name, await import(url));
    URL.revokeObjectURL(url);
  }
  const models: SavedModel[] = [];
  for (const row of saved.rows) {
    const line = document.createElement("div");
    line.className = "page-row";
    line.style.gridTemplateColumns = row.map((item) => item.width).join(" ");
    document.getElementById("wb-page")!.append(line);
    for (const { bundle, state, buffers } of row) {
      putBuffers(state, buffers);
      const model = new SavedModel(state);
      const el = document.createElement("div");
      line.append(el);
      modules.get(bundle)!.default.render({ model, el, signal: new AbortController().signal });
      models.push(model);
    }
  }
  Object.assign(window, { workbenchModels: models });
  document.documentElement.dataset["ready"] = "true";
}

void main();
