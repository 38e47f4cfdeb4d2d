/** Drawing of the heat map: whole pixels, empty cells hatched, marks on top. */

import { fit } from "./lib/canvas";
import { colourAt, type Table } from "./lib/colour";

export interface Geometry {
  rows: number;
  columns: number;
  cellWidth: number;
  cellHeight: number;
}

export interface Scale {
  colours: Table;
  limit: number;
  signed: boolean;
}

export interface Ink {
  accent: string;
  hatch: string;
  ground: string;
  strong: string;
}

/** Where on the colour scale a value lies, in 0…1. */
export function position(value: number, scale: Scale): number {
  const part = scale.limit > 0 ? value / scale.limit : 0;
  return Math.min(1, Math.max(0, scale.signed ? (part + 1) / 2 : part));
}

/** The limit that fits the values where none is given. */
export function autoLimit(values: Float32Array, floor: number | null): number {
  let most = floor ?? 0;
  for (const value of values) if (Number.isFinite(value) && Math.abs(value) > most) most = Math.abs(value);
  return most || 1;
}

export function drawCells(canvas: HTMLCanvasElement, g: Geometry, values: Float32Array, scale: Scale, ink: Ink): CanvasRenderingContext2D {
  const context = fit(canvas, g.columns * g.cellWidth, g.rows * g.cellHeight);
  context.clearRect(0, 0, g.columns * g.cellWidth, g.rows * g.cellHeight);
  const hatch = hatching(context, ink);
  for (let row = 0; row < g.rows; row++) {
    for (let column = 0; column < g.columns; column++) {
      const value = values[row * g.columns + column] ?? NaN;
      context.fillStyle = Number.isFinite(value) ? colourAt(scale.colours, position(value, scale)) : hatch;
      context.fillRect(column * g.cellWidth, row * g.cellHeight, g.cellWidth - 1, g.cellHeight - 1);
    }
  }
  return context;
}

function hatching(context: CanvasRenderingContext2D, ink: Ink): CanvasPattern | string {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const pen = tile.getContext("2d")!;
  pen.fillStyle = ink.ground;
  pen.fillRect(0, 0, 6, 6);
  pen.strokeStyle = ink.hatch;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(-1, 7);
  pen.lineTo(7, -1);
  pen.moveTo(-1, 1);
  pen.lineTo(1, -1);
  pen.moveTo(5, 7);
  pen.lineTo(7, 5);
  pen.stroke();
  return context.createPattern(tile, "repeat") ?? ink.ground;
}

/** An outline around the steps `first…end` of a row. */
export function outline(context: CanvasRenderingContext2D, g: Geometry, row: number, first: number, end: number, colour: string, ground: string): void {
  const x = first * g.cellWidth;
  const y = row * g.cellHeight;
  const width = (end - first) * g.cellWidth - 1;
  const height = g.cellHeight - 1;
  context.lineWidth = 2;
  context.strokeStyle = ground;
  context.strokeRect(x + 2, y + 2, width - 4, height - 4);
  context.strokeStyle = colour;
  context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
}
