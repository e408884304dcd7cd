// TeX in Markdown, as rules of markdown-it: \( \), $ $ within a line, \[ \] and $$ $$ within a line or on lines of their own.

const PAIRS = [['\\(', '\\)', false], ['\\[', '\\]', true], ['$$', '$$', true]];
const LONGEST_DOLLARS = 300; // characters between single dollars; further apart, they are prices

/** Adds a token `math` with the TeX as `content` and {display, open} as `meta`; `open`: its end has not arrived yet. */
export function inlineRule(state, silent) {
  const { src, pos, env } = state;
  const pair = PAIRS.find(([opener]) => src.startsWith(opener, pos));
  if (!pair) return dollarRule(state, silent);
  const [opener, closer, display] = pair;
  const from = pos + opener.length;
  let end = find(state, closer, from);
  const open = end < 0 && env.atEnd && opener !== '$$';
  if (open) end = src.length;
  if (end < 0) return false;
  return push(state, silent, { from, end, next: Math.min(end + closer.length, src.length), display, open, markup: opener });
}

/** $x$: no space inside the dollars and no digit after them, so that "$5 and $10" is not a formula. */
function dollarRule(state, silent) {
  const { src, pos } = state;
  if (src[pos] !== '$' || /[\s$]/.test(src[pos + 1] ?? ' ') || /\w/.test(src[pos - 1] ?? '')) return false;
  const from = pos + 1;
  const line = src.slice(from, from + LONGEST_DOLLARS).split('\n', 1)[0];
  const match = /^(?:[^$\\`]|\\.)*?[^\s$\\`]\$(?!\d)/.exec(line);
  if (!match) return false;
  const end = from + match[0].length - 1;
  return push(state, silent, { from, end, next: end + 1, display: false, open: false, markup: '$' });
}

function push(state, silent, { from, end, next, display, open, markup }) {
  if (!silent) {
    const token = state.push('math', 'math', 0);
    token.content = state.src.slice(from, end).trim();
    Object.assign(token, { markup, meta: { display, open } });
  }
  state.pos = next;
  return true;
}

/** The position of `closer`; a missing one is searched for only once per text. */
function find(state, closer, from) {
  state.missing ??= new Set();
  if (state.missing.has(closer)) return -1;
  const index = state.src.indexOf(closer, from);
  if (index < 0) state.missing.add(closer);
  return index;
}

/** Display TeX from a line that starts with its opener to one that ends with its closer, or to a blank line. */
export function blockRule(state, start, end, silent) {
  const text = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]).trim();
  const first = text(start);
  const closer = closerOf(first);
  if (!closer) return false;
  if (silent) return true;
  const lines = [first.slice(2)];
  let line = start;
  const closed = () => lines[lines.length - 1].endsWith(closer);
  while (!closed() && line + 1 < end && !state.isEmpty(line + 1) && state.sCount[line + 1] >= state.blkIndent) {
    line += 1;
    lines.push(text(line));
  }
  const open = !closed();
  const token = state.push('math_block', 'math', 0);
  token.content = (open ? lines.join('\n') : lines.join('\n').slice(0, -2)).trim();
  Object.assign(token, { block: true, map: [start, line + 1], markup: first.slice(0, 2), meta: { display: true, open } });
  state.line = line + 1;
  return true;
}

function closerOf(line) {
  const closer = line.startsWith('\\[') ? '\\]' : line.startsWith('$$') ? '$$' : null;
  const at = closer ? line.indexOf(closer, 2) : -1;
  return at < 0 || at === line.length - 2 ? closer : null; // otherwise it is part of a sentence
}
