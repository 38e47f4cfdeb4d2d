/** Colour maps as 256-entry tables of RGB. Stops are evenly spaced samples of the published maps. */

const STOPS = {
  viridis:
    "440154 481567 482677 453781 404788 39568c 33638d 2d708e 287d8e 238a8d 1f968b 20a387 29af7f 3cbb75 55c667 73d055 95d840 b8de29 dce319 fde725",
  cividis:
    "00224e 002d6c 1a386f 30436d 404e6c 4e596d 5a6370 666e74 727a78 7f8578 8c9078 9a9c75 a8a872 b8b56b c7c263 d7cf58 e8dd49 fee838",
  // Diverging: a neutral middle that sinks into the ground of the theme.
  light: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
  dark: "9eb0ff 6fa8e8 3f8cb9 225f82 18344a 1d1b1d 3f1a12 6b3226 9b574a cb8079 ffacac",
} as const;

export type MapName = keyof typeof STOPS;
export type Table = Uint8ClampedArray;

const made = new Map<MapName, Table>();

/** The 256 × 3 table of a map. */
export function table(name: MapName): Table {
  let result = made.get(name);
  if (!result) {
    result = interpolate(STOPS[name].split(" ").map((hex) => parseInt(hex, 16)));
    made.set(name, result);
  }
  return result;
}

function interpolate(stops: number[]): Table {
  const result = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    const part = place - below;
    for (let c = 0; c < 3; c++) {
      const shift = 16 - 8 * c;
      const low = (stops[below]! >> shift) & 255;
      const high = (stops[below + 1]! >> shift) & 255;
      result[3 * i + c] = low + (high - low) * part;
    }
  }
  return result;
}

/** The CSS colour at `t` in 0…1. */
export function colourAt(colours: Table, t: number): string {
  const i = 3 * Math.round(255 * Math.min(1, Math.max(0, t)));
  return `rgb(${colours[i]} ${colours[i + 1]} ${colours[i + 2]})`;
}

/** A left-to-right CSS gradient of the whole map. */
export function gradient(colours: Table): string {
  const stops = Array.from({ length: 17 }, (_, i) => colourAt(colours, i / 16));
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** Whether the ground that the element stands on is dark. */
export function isDark(element: Element): boolean {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  if (!probe) return false;
  probe.fillStyle = getComputedStyle(element).backgroundColor;
  probe.fillRect(0, 0, 1, 1);
  const [r = 255, g = 255, b = 255] = probe.getImageData(0, 0, 1, 1).data;
  return 0.299 * r + 0.587 * g + 0.114 * b < 128;
}

/** Calls `update` when JupyterLab or the system changes between light and dark. */
export function onTheme(update: () => void, signal: AbortSignal): void {
  const observer = new MutationObserver(update);
  const attributeFilter = ["data-jp-theme-name", "data-jp-theme-light", "data-theme", "class"];
  observer.observe(document.body, { attributes: true, attributeFilter });
  observer.observe(document.documentElement, { attributes: true, attributeFilter });
  signal.addEventListener("abort", () => observer.disconnect());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update, { signal });
}
