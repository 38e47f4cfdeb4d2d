/** Canvases that match the pixels of the screen, and PNG bytes that become bitmaps. */

export type Bytes = DataView | ArrayBuffer | Uint8Array | null | undefined;

/** The bytes behind whatever the host handed over; null where there are none. */
export function bytes(value: Bytes): Uint8Array<ArrayBuffer> | null {
  if (!value) return null;
  if (value instanceof ArrayBuffer) return value.byteLength ? new Uint8Array(value) : null;
  if (!value.byteLength) return null;
  return new Uint8Array(value.buffer as ArrayBuffer, value.byteOffset, value.byteLength);
}

/** Decodes PNG bytes. */
export async function decode(value: Bytes): Promise<ImageBitmap | null> {
  const data = bytes(value);
  return data ? createImageBitmap(new Blob([data], { type: "image/png" })) : null;
}

/** Gives the canvas `width` × `height` CSS pixels at the screen's density and returns its scaled context. */
export function fit(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = devicePixelRatio || 1;
  const w = Math.max(1, Math.round(width * ratio));
  const tall = Math.max(1, Math.round(height * ratio));
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== tall) canvas.height = tall;
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** Draws a picture over the whole canvas: crisp when enlarged, smooth when shrunk. */
export function drawPicture(context: CanvasRenderingContext2D, picture: CanvasImageSource & { width: number }): void {
  const { canvas } = context;
  context.save();
  context.resetTransform();
  context.imageSmoothingEnabled = picture.width > canvas.width;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.restore();
}

/** Calls `update` when the element's size changes, until the signal. */
export function onResize(element: Element, update: () => void, signal: AbortSignal): void {
  const observer = new ResizeObserver(update);
  observer.observe(element);
  signal.addEventListener("abort", () => observer.disconnect());
}
