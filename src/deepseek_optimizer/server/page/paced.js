// Calls work once a frame at most, and less often where it is dear, so that a long answer never takes the page from its reader.

const SHARE = 4; // after work that took 5 ms, 15 ms are left to the rest of the page

/** A function that asks for `work()`; many askings before the next frame are one. */
export function paced(work) {
  let asked = false;
  let earliest = 0;
  const run = () => {
    asked = false;
    const from = performance.now();
    work();
    const until = performance.now();
    earliest = until + (until - from) * (SHARE - 1);
  };
  return () => {
    if (asked) return;
    asked = true;
    const wait = earliest - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(run), wait);
    else requestAnimationFrame(run);
  };
}
