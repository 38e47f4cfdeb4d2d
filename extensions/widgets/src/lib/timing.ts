/** When things happen: at most once a frame, at most so often. */

/** Joins any number of calls before the next frame into one. */
export function perFrame(draw: () => void): () => void {
  let waiting = 0;
  return () => {
    if (waiting) return;
    waiting = requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  };
}

/** Calls at once, then at most every `gap` milliseconds; the last call is never lost. */
export function throttle(call: () => void, gap: number): () => void {
  let last = -Infinity;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const fire = (): void => {
    timer = undefined;
    last = performance.now();
    call();
  };
  return () => {
    if (timer !== undefined) return;
    const wait = last + gap - performance.now();
    if (wait <= 0) fire();
    else timer = setTimeout(fire, wait);
  };
}
