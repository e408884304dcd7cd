// Lines of Markdown to blocks, in time linear in the text. Inline marks are left as text: markdown_inline.js reads them.
//
// Blocks, each with `from`, the index of its first line, and `end`, the one after its last: {kind: 'paragraph' | 'heading', text}
// · {kind: 'code', info, text} · {kind: 'math', text} · {kind: 'quote', blocks} · {kind: 'rule'} · {kind: 'table', align, head, rows}
// · {kind: 'list', ordered, start, loose, items: [{blocks, checked}]}
//
// CommonMark with GitHub's tables and task lists, less what models don't mean: four spaces are not code, "---" is a rule also
// under a paragraph, HTML is text, and references are not looked up, so that no line changes the meaning of a block before it.

const MAX_NESTED = 12; // deeper containers are shown as text
const FENCE = /^ *(`{3,}|~{3,})([^\n]*)$/;
const MARKER = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

/** The blocks of `lines`. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    block.from = at;
    at = block.end;
    blocks.push(block);
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  if (fenceOf(line)) return codeAt(lines, at);
  if (isMath(line)) return mathAt(lines, at);
  const heading = headingOf(line);
  if (heading) return { kind: 'heading', ...heading, end: at + 1 };
  if (isRule(line)) return { kind: 'rule', end: at + 1 };
  if (depth < MAX_NESTED && isQuote(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_NESTED && markerOf(line)) return listAt(lines, at, depth);
  if (isTable(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

const isBlank = (line) => line.trim() === '';
const indentOf = (line) => line.length - line.trimStart().length;
const isQuote = (line) => /^ {0,3}>/.test(line);

function fenceOf(line) {
  const match = FENCE.exec(line);
  // A backtick after a fence of backticks makes it a code span in running text.
  return match && !(match[1][0] === '`' && match[2].includes('`')) ? { fence: match[1], info: match[2].trim() } : null;
}

function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text[0] === fence[0] && text === fence[0].repeat(text.length);
}

const isRule = (line) => {
  const text = line.replace(/ /g, '');
  return text.length >= 3 && '-*_'.includes(text[0]) && text === text[0].repeat(text.length) && indentOf(line) < 4;
};

function headingOf(line) {
  const match = /^ {0,3}(#{1,6})(?: |$)/.exec(line);
  if (!match) return null;
  let text = line.slice(match[0].length).trim();
  let end = text.length;
  while (text[end - 1] === '#') end -= 1;
  if (end === 0 || text[end - 1] === ' ') text = text.slice(0, end).trim(); // closing marks
  return { level: match[1].length, text };
}

const isUnderline = (line) => {
  const text = line.trim();
  return text.length >= 3 && text === '='.repeat(text.length);
};

function markerOf(line) {
  const match = MARKER.exec(line);
  if (!match || isRule(line)) return null;
  const ordered = match[2].length > 1;
  const spaces = match[3].length > 4 || match[3].length === 0 ? 1 : match[3].length;
  return {
    indent: match[1].length,
    content: match[1].length + match[2].length + spaces, // where the item's own text starts
    kind: match[2][match[2].length - 1],
    ordered,
    start: ordered ? parseInt(match[2], 10) : 1,
    empty: isBlank(line.slice(match[0].length)),
  };
}

/** Whether a line ends the paragraph above it. */
function interrupts(line, depth) {
  if (fenceOf(line) || headingOf(line) || isRule(line) || isMath(line)) return true;
  if (depth >= MAX_NESTED) return false;
  const marker = markerOf(line);
  return isQuote(line) || Boolean(marker && !marker.empty && (!marker.ordered || marker.start === 1));
}

function paragraphAt(lines, at, depth) {
  let end = at + 1;
  for (; end < lines.length && !isBlank(lines[end]); end += 1) {
    if (isUnderline(lines[end])) {
      return { kind: 'heading', level: 1, text: joined(lines, at, end), end: end + 1 };
    }
    if (interrupts(lines[end], depth) || isTable(lines, end)) break;
  }
  return { kind: 'paragraph', text: joined(lines, at, end), end };
}

const joined = (lines, from, end) =>
  lines
    .slice(from, end)
    .map((line) => line.trimStart())
    .join('\n')
    .trimEnd();

function codeAt(lines, at) {
  const { fence, info } = fenceOf(lines[at]);
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], fence)) end += 1;
  const inside = lines.slice(at + 1, end);
  const text = (indent ? inside.map((line) => line.slice(Math.min(indent, indentOf(line)))) : inside).join('\n');
  return { kind: 'code', info, text, end: Math.min(end + 1, lines.length) };
}

/** Display TeX: from a line that starts with \[ (or is $$ alone) to the one that ends with its closer, or to a blank line. */
const isMath = (line) => {
  const text = line.trim();
  if (text.startsWith('\\[')) return !text.includes('\\]') || text.endsWith('\\]'); // else it is math within a sentence
  return text === '$$';
};

function mathAt(lines, at) {
  const closer = lines[at].trimStart().startsWith('\\[') ? '\\]' : '$$';
  const closes = (line) => line.trimEnd().endsWith(closer);
  let end = at;
  if (!closes(lines[at].trimStart().slice(2))) {
    end += 1;
    while (end < lines.length && !isBlank(lines[end]) && !closes(lines[end])) end += 1;
  }
  end = Math.min(end + 1, lines.length);
  const text = lines.slice(at, end).join('\n').trim().slice(2);
  return { kind: 'math', text: (text.endsWith(closer) ? text.slice(0, -2) : text).trim(), end };
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && isQuote(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ''));
  return { kind: 'quote', blocks: parseBlocks(inside, depth + 1), end };
}

function listAt(lines, at, depth) {
  const first = markerOf(lines[at]);
  const items = [];
  let item = null; // {lines, marker, fence}
  let loose = false;
  let blanks = 0;
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (isBlank(line)) {
      blanks += 1;
      continue;
    }
    const own = item && indentOf(line) >= Math.min(item.marker.content, item.marker.indent + 2);
    if (own) {
      fill(item, blanks);
      add(item, line.slice(Math.min(indentOf(line), item.marker.content)));
    } else {
      const marker = markerOf(line);
      if (marker && marker.kind === first.kind) {
        if (blanks && item) loose = true;
        item = { lines: [], marker, fence: null };
        items.push(item);
        add(item, line.slice(marker.content));
      } else if (item && !blanks && !item.fence && !marker && !interrupts(line, depth)) add(item, line.trimStart());
      else break;
    }
    blanks = 0;
  }
  const made = items.map((one) => finish(one, depth));
  loose ||= made.some((one) => one.blocks.filter((block) => block.kind === 'paragraph').length > 1);
  return { kind: 'list', ordered: first.ordered, start: first.start, loose, items: made, end: end - blanks };
}

function fill(item, blanks) {
  for (let left = blanks; left > 0; left -= 1) item.lines.push('');
}

function add(item, line) {
  item.lines.push(line);
  if (item.fence) {
    if (closesFence(line, item.fence)) item.fence = null;
  } else item.fence = fenceOf(line)?.fence ?? null;
}

function finish(item, depth) {
  const task = /^\[([ xX])\] /.exec(item.lines[0]);
  if (task) item.lines[0] = item.lines[0].slice(4);
  return { blocks: parseBlocks(item.lines, depth + 1), checked: task ? task[1] !== ' ' : null };
}

/** The cells of a table's row: "|" parts them, "\|" does not. */
function cellsOf(line) {
  const cells = [];
  let cell = '';
  const text = line.trim();
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === '\\' && text[at + 1] === '|') {
      cell += '|';
      at += 1;
    } else if (text[at] === '|') {
      if (at) cells.push(cell.trim());
      cell = '';
    } else cell += text[at];
  }
  if (cell.trim() || !text.endsWith('|')) cells.push(cell.trim());
  return cells;
}

function isTable(lines, at) {
  const under = lines[at + 1];
  if (under === undefined || !under.includes('-') || !lines[at].includes('|') || !/^[ |:-]+$/.test(under)) return false;
  const marks = cellsOf(under);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && cellsOf(lines[at]).length === marks.length;
}

function tableAt(lines, at) {
  const align = cellsOf(lines[at + 1]).map((mark) => {
    if (mark.endsWith(':')) return mark.startsWith(':') ? 'center' : 'right';
    return mark.startsWith(':') ? 'left' : null;
  });
  let end = at + 2;
  const rows = [];
  for (; end < lines.length && lines[end].includes('|') && !fenceOf(lines[end]); end += 1) {
    rows.push(cellsOf(lines[end]).slice(0, align.length));
  }
  return { kind: 'table', align, head: cellsOf(lines[at]), rows, end };
}
