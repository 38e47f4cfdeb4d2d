/** The frames of every lane, decoded once each and kept. */

import { type Bytes, decode } from "./lib/canvas";

export interface Lane {
  label: string;
  frames: Record<string, Bytes[]>;
  final?: Bytes;
}

/** The kind that shows the finished image at every step. */
export const FINAL = "final image";

export function stepCount(lanes: readonly Lane[], rows: readonly unknown[]): number {
  const counts = lanes.flatMap((lane) => Object.values(lane.frames ?? {}).map((frames) => frames.length));
  return Math.max(0, rows.length, ...counts);
}

export function frameBytes(lane: Lane, kind: string, step: number): Bytes {
  return kind === FINAL ? lane.final : lane.frames?.[kind]?.[step];
}

type Slot = ImageBitmap | "pending" | "broken";

export class Frames {
  private slots = new Map<Bytes, Slot>();
  broken = 0;

  constructor(private readonly ready: () => void) {}

  /** The bitmap, if it is decoded; asks for it if not. */
  get(data: Bytes): Slot | null {
    if (!data) return null;
    const slot = this.slots.get(data);
    if (slot === undefined) void this.load(data);
    return slot ?? "pending";
  }

  /** Decodes everything of a kind, so that the first scrub is as smooth as the second. */
  warm(lanes: readonly Lane[], kind: string): void {
    for (const lane of lanes) {
      for (const data of kind === FINAL ? [lane.final] : (lane.frames?.[kind] ?? [])) this.get(data);
    }
  }

  private async load(data: Bytes): Promise<void> {
    this.slots.set(data, "pending");
    const picture = await decode(data).catch(() => null);
    if (!this.slots.has(data)) {
      picture?.close();
      return;
    }
    if (!picture) this.broken += 1;
    this.slots.set(data, picture ?? "broken");
    this.ready();
  }

  /** Forgets what none of these lanes uses. */
  keepOnly(lanes: readonly Lane[]): void {
    const used = new Set<Bytes>();
    for (const lane of lanes) {
      used.add(lane.final);
      for (const frames of Object.values(lane.frames ?? {})) for (const data of frames) used.add(data);
    }
    for (const [data, slot] of this.slots) {
      if (used.has(data)) continue;
      if (slot instanceof ImageBitmap) slot.close();
      this.slots.delete(data);
    }
    this.broken = [...this.slots.values()].filter((slot) => slot === "broken").length;
  }
}
