/** Which steps a cell covers; the same rule as `window` in workbench/experiments/windows.py. */

export const WINDOWS = ["1", "quarter", "half", "to here", "from here"] as const;

/** First step and one past the last, of a window at `column`. */
export function windowSteps(window: string, column: number, steps: number): [number, number] {
  if (window === "to here") return [0, column + 1];
  if (window === "from here") return [column, steps];
  const share = { quarter: 4, half: 2 }[window];
  const width = share ? Math.max(1, Math.round(steps / share)) : 1;
  const first = column - Math.floor((width - 1) / 2);
  return [Math.max(0, first), Math.min(steps, first + width)];
}

/** `steps 4–8`, counting as the ledger does. */
export function stepsText(first: number, end: number): string {
  return end - first === 1 ? `step ${first}` : `steps ${first}–${end - 1}`;
}
