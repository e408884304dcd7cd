// Calls a function at most once per frame, and less often if it is slow, so that a long answer does not block the page.

const SHARE = 4; // after 5 ms of work, 15 ms are left for the rest of the page

/** Returns a function that schedules `work()`; several calls before the next frame count as one. */
export function paced(work) {
  let scheduled = false;
  let earliest = 0;
  const run = () => {
    scheduled = false;
    const from = performance.now();
    work();
    const until = performance.now();
    earliest = until + (until - from) * (SHARE - 1);
  };
  return () => {
    if (scheduled) return;
    scheduled = true;
    const wait = earliest - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(run), wait);
    else requestAnimationFrame(run);
  };
}
