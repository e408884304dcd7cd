// The end of a text that is still growing: open marks are treated as closed, so that the user does not see "**bold" change to bold.

const MAX_CLOSED = 10; // maximum number of delimiters that are closed; more are not intended as emphasis

/** The last inline text of an unfinished answer, without an incomplete mark or link, and with its code span closed. */
export function finishInline(text) {
  const ticks = openTicks(text);
  if (ticks) return text.endsWith(ticks) ? text.slice(0, -ticks.length) : text + ticks;
  const link = text.lastIndexOf('](');
  const bracket = link < 0 || /[()\s]/.test(text.slice(link + 2)) ? -1 : text.lastIndexOf('[', link);
  if (bracket >= 0) return text.slice(0, bracket).replace(/!$/, '') + text.slice(bracket + 1, link);
  return text.replace(/[*_~`]{1,3}$/, ''); // it may be incomplete
}

/** The backticks that open a code span without an end; '' if there are none. */
function openTicks(text) {
  const runs = (text.match(/`+/g) ?? []).map((run) => run.length);
  const left = new Map(); // length -> number of runs that follow
  for (const length of runs) left.set(length, (left.get(length) ?? 0) + 1);
  let inside = 0;
  for (const length of runs) {
    left.set(length, left.get(length) - 1);
    if (inside) inside = length === inside ? 0 : inside;
    else if (left.get(length)) inside = length;
    else return '`'.repeat(length);
  }
  return '';
}

/** A markdown-it rule: emphasis delimiters without a closer are closed at the end of the text. */
export function closeDelimiters(state) {
  if (!state.env.atEnd) return;
  const { delimiters } = state;
  const open = [];
  let covered = -1; // delimiters up to here are inside a pair
  for (const [index, delimiter] of delimiters.entries()) {
    if (delimiter.end > covered) covered = delimiter.end;
    else if (index > covered && delimiter.open && delimiter.end < 0) open.push(delimiter);
  }
  for (const delimiter of open.slice(-MAX_CLOSED).reverse()) {
    const token = state.push('text', '', 0);
    token.content = '';
    const { marker, length } = delimiter;
    delimiters.push({ marker, length, token: state.tokens.length - 1, end: -1, open: false, close: true });
    delimiter.end = delimiters.length - 1;
  }
}
