/** Numbers as people read them. */

const UNITS: [number, string][] = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "K"],
];

/** 5_234_112 → "5.2 M". */
export function count(value: number): string {
  for (const [size, unit] of UNITS) {
    if (value >= size) return `${fixed(value / size)}\u202f${unit}`;
  }
  return String(value);
}

/** 5_234_112 → "5.2 MB". */
export function bytes(value: number): string {
  const [size, unit] = ([[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]] as const).find(([least]) => value >= least) ?? [1, "B"];
  return `${size === 1 ? value : fixed(value / size)}\u202f${unit}`;
}

function fixed(value: number): string {
  return value >= 99.95 ? value.toFixed(0) : value.toFixed(1);
}

/** Three significant digits, no exponent where one is not needed. */
export function significant(value: number): string {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replace("-", "−");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toFixed(digits).replace("-", "−");
}

/** 74 → "1 min 14 s". */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Iterations a second, or seconds an iteration where that is clearer. */
export function speed(rate: number): string {
  return rate >= 1 ? `${rate.toFixed(1)} it/s` : `${(1 / rate).toFixed(1)} s/it`;
}
