/** Attention maps as they arrive: uint8 values with one scale a layer and token. */

import { bytes, type Bytes } from "./lib/canvas";
import type { Table } from "./lib/colour";

export interface Token {
  text: string;
  index: number;
  special: boolean;
}

export interface Attention {
  lane?: number;
  layers?: string[];
  tokens?: Token[];
  shape?: [number, number, number, number, number];
  scales?: number[][];
  data?: Bytes;
}

/** A place of the picture, from 0 to 1 each way from its upper left corner. */
export interface Place {
  x: number;
  y: number;
}

export interface Field {
  width: number;
  height: number;
  values: Float32Array;
}

export class Maps {
  private readonly data: Uint8Array;
  private tops = new Map<string, number>();

  private constructor(private readonly source: Required<Omit<Attention, "data">>, data: Uint8Array) {
    this.data = data;
  }

  /** The maps, or null where there are none or where shape and data disagree. */
  static from(source: Attention): Maps | null {
    const data = bytes(source.data);
    const { shape, scales, layers, tokens, lane = 0 } = source;
    if (!data || !shape || !scales || !layers || !tokens) return null;
    if (shape.reduce((all, n) => all * n, 1) !== data.length) return null;
    return new Maps({ shape, scales, layers, tokens, lane }, data);
  }

  get layers(): string[] {
    return this.source.layers;
  }

  get lane(): number {
    return this.source.lane;
  }

  /** The sum over tokens (their indices in the prompt) at one layer and step. */
  field(layer: number, step: number, tokens: readonly number[]): Field {
    const [layers, steps, count, height, width] = this.source.shape;
    const l = Math.min(Math.max(layer, 0), layers - 1);
    const s = Math.min(Math.max(step, 0), steps - 1);
    const size = width * height;
    const values = new Float32Array(size);
    for (const t of this.places(tokens)) {
      const scale = (this.source.scales[l]?.[t] ?? 0) / 255;
      const start = ((l * steps + s) * count + t) * size;
      for (let i = 0; i < size; i++) values[i]! += this.data[start + i]! * scale;
    }
    return { width, height, values };
  }

  /** The largest value of these tokens' sum over all steps: the top of the legend, the same while scrubbing. */
  top(layer: number, tokens: readonly number[]): number {
    const key = `${layer}:${[...tokens].sort().join()}`;
    let top = this.tops.get(key);
    if (top === undefined) {
      top = 0;
      for (let s = 0; s < this.source.shape[1]; s++) {
        for (const value of this.field(layer, s, tokens).values) if (value > top) top = value;
      }
      this.tops.set(key, top);
    }
    return top;
  }

  /** The weight of every token at a place of the picture, from 0 to 1 each way, in the tokens' order. */
  at(layer: number, step: number, { x, y }: Place): number[] {
    const cell = this.cell({ x, y });
    return this.source.tokens.map((token) => this.field(layer, step, [token.index]).values[cell.y * cell.width + cell.x]!);
  }

  /** The middle of the map's cell a place lies in, or of one so many cells further on. */
  centre(place: Place, right = 0, down = 0): Place {
    const cell = this.cell(place);
    const clamp = (value: number, size: number): number => (Math.max(0, Math.min(size - 1, value)) + 0.5) / size;
    return { x: clamp(cell.x + right, cell.width), y: clamp(cell.y + down, cell.height) };
  }

  private cell({ x, y }: Place): { x: number; y: number; width: number; height: number } {
    const [, , , height, width] = this.source.shape;
    const clamp = (value: number, size: number): number => Math.max(0, Math.min(size - 1, Math.floor(value * size)));
    return { x: clamp(x, width), y: clamp(y, height), width, height };
  }

  private places(tokens: readonly number[]): number[] {
    return tokens.map((index) => this.source.tokens.findIndex((token) => token.index === index)).filter((place) => place >= 0);
  }
}

/** A small canvas holding the field in colour, to be drawn large. */
export function paint(field: Field, top: number, colours: Table, onto: HTMLCanvasElement): HTMLCanvasElement {
  onto.width = field.width;
  onto.height = field.height;
  const context = onto.getContext("2d")!;
  const image = context.createImageData(field.width, field.height);
  field.values.forEach((value, i) => {
    const c = 3 * Math.round(255 * Math.min(1, top > 0 ? value / top : 0));
    image.data[4 * i] = colours[c]!;
    image.data[4 * i + 1] = colours[c + 1]!;
    image.data[4 * i + 2] = colours[c + 2]!;
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return onto;
}
