/** What a PatchMap shows, and its values unpacked. */

import { bytes, type Bytes } from "./lib/canvas";
import type { ElementState } from "./lib/panel";

export interface State extends ElementState {
  sites: string[];
  steps: number;
  values: Bytes;
  metric: string;
  noise_floor: number | null;
  limit: number;
  signed: boolean;
  window: string;
  selected: number[];
  busy: number[];
  status: "idle" | "running";
  progress: { done?: number; of?: number };
  source_label: string;
  target_label: string;
}

export type Cell = readonly [row: number, column: number];

/** A cell from a trait that is `[row, column]` or `[]`. */
export function cellOf(trait: readonly number[]): Cell | null {
  const [row, column] = trait;
  return row === undefined || column === undefined ? null : [row, column];
}

/** The values, NaN everywhere while their number does not fit the map. */
export function unpack(data: Bytes, size: number): Float32Array {
  const raw = bytes(data);
  if (raw?.byteLength === 4 * size) return new Float32Array(raw.slice().buffer);
  return new Float32Array(size).fill(NaN);
}
