// Inline Markdown to a tree of plain objects: CommonMark's delimiter algorithm, in time linear in the text.
//
// Nodes: {type: 'text', text} · {type: 'code', text} · {type: 'math', text} · {type: 'break'} · {type: 'em' | 'strong' | 'del',
// children} · {type: 'link', href, children} · {type: 'image', href, alt}. An href is only text here: render.js judges it.

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const WIDE = /[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]/; // no spaces between words: emphasis may start anywhere
const SPECIAL = /https?:\/\/|[\\`*_~[\]!<&\n$]/g;
const URL_TEXT = /https?:\/\/[A-Za-z0-9\-._~:/?#@!$&'()*+,;=%]+/y; // no brackets: they may be those of a link around it
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]*)>/y;
const LINE_BREAK_TAG = /<br ?\/?>/iy;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([A-Za-z]{2,6}));/y;
const NAMED = { amp: '&', lt: '<', gt: '>', quot: '"', apos: "'", nbsp: '\u00a0', copy: '©', hellip: '…', mdash: '—', ndash: '–', times: '×' };
const MAX_NESTED = 20; // a hostile text must not make a tree that the browser can't lay out
const MAX_PARENTHESES = 32;
const LONGEST_ALT = 300;

/** The nodes of `text`. `unfinished`: more is to come, so what is open at the end is taken as closed there. */
export function parseInline(text, unfinished = false) {
  // A marker at the very end may be half of one: it shows when the rest of it is known.
  return new Inline(unfinished ? text.replace(/[*_~`]{1,3}$/, '') : text, unfinished).parse();
}

class Inline {
  constructor(text, unfinished) {
    this.text = text;
    this.unfinished = unfinished;
    this.at = 0;
    this.items = []; // nodes, and runs of delimiters: {type: 'run', ch, count, length, canOpen, canClose, opens, closes}
    this.brackets = []; // {index in items, image}
    this.deadBelow = 0; // brackets under this index would put a link into a link
    this.missing = new Set(); // closers that do not occur in the rest of the text: they are looked for once
    this.ticks = null;
  }

  parse() {
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const found = SPECIAL.exec(this.text);
      this.addText(this.text.slice(this.at, found ? found.index : undefined));
      if (!found) break;
      this.at = found.index;
      this.special(found[0]);
    }
    return nest(this.items, this.unfinished);
  }

  special(token) {
    if (token === '\\') this.backslash();
    else if (token === '`') this.code();
    else if (token === '*' || token === '_' || token === '~') this.run(token);
    else if (token === '[') this.open(false);
    else if (token === '!') this.text[this.at + 1] === '[' ? this.open(true) : this.literal(1);
    else if (token === ']') this.close();
    else if (token === '<') this.angle();
    else if (token === '&') this.entity();
    else if (token === '$') this.text[this.at + 1] === '$' ? this.math('$$', '$$') : this.literal(1);
    else if (token === '\n') this.break();
    else this.bareUrl();
  }

  addText(text) {
    if (!text) return;
    const last = this.items[this.items.length - 1];
    if (last?.type === 'text') last.text += text;
    else this.items.push({ type: 'text', text });
  }

  literal(length) {
    this.addText(this.text.slice(this.at, this.at + length));
    this.at += length;
  }

  break() {
    const last = this.items[this.items.length - 1];
    if (last?.type === 'text') last.text = last.text.trimEnd();
    this.items.push({ type: 'break' });
    this.at += 1;
    while (this.text[this.at] === ' ') this.at += 1;
  }

  backslash() {
    const next = this.text[this.at + 1];
    if (next === '(') this.math('\\(', '\\)');
    else if (next === '[') this.math('\\[', '\\]');
    else if (next === '\n') {
      this.at += 1;
      this.break();
    } else if (next !== undefined && PUNCTUATION.test(next)) {
      this.addText(next);
      this.at += 2;
    } else this.literal(1);
  }

  /** Where `closer` is from `from` on, or -1; a closer that is missing is not searched for again. */
  find(closer, from) {
    if (this.missing.has(closer)) return -1;
    const index = this.text.indexOf(closer, from);
    if (index < 0) this.missing.add(closer);
    return index;
  }

  /** TeX stays as it was written: there is no typesetter here, but emphasis must not eat its underscores. */
  math(opener, closer) {
    let end = this.find(closer, this.at + opener.length);
    if (end < 0 && this.unfinished && opener !== '$$') end = this.text.length;
    if (end < 0) {
      this.literal(opener === '$$' ? 2 : 1);
      return;
    }
    this.items.push({ type: 'math', text: this.text.slice(this.at + opener.length, end).trim() });
    this.at = Math.min(end + closer.length, this.text.length);
  }

  code() {
    const start = this.at;
    let length = 1;
    while (this.text[start + length] === '`') length += 1;
    let end = this.nextTicks(length, start + length);
    if (end < 0 && this.unfinished) end = this.text.length;
    if (end < 0) return this.literal(length);
    let inside = this.text.slice(start + length, end).replace(/\n/g, ' ');
    if (inside.startsWith(' ') && inside.endsWith(' ') && inside.trim()) inside = inside.slice(1, -1);
    this.items.push({ type: 'code', text: inside });
    this.at = Math.min(end + length, this.text.length);
  }

  /** The next run of exactly `length` backticks; all runs are found in one pass, and each list is walked once. */
  nextTicks(length, from) {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const match of this.text.matchAll(/`+/g)) {
        const size = match[0].length;
        if (!this.ticks.has(size)) this.ticks.set(size, { places: [], next: 0 });
        this.ticks.get(size).places.push(match.index);
      }
    }
    const runs = this.ticks.get(length);
    if (!runs) return -1;
    while (runs.next < runs.places.length && runs.places[runs.next] < from) runs.next += 1;
    return runs.places[runs.next] ?? -1;
  }

  run(ch) {
    const start = this.at;
    let length = 1;
    while (this.text[start + length] === ch) length += 1;
    this.at = start + length;
    if (ch === '~' && length !== 2) return this.addText(ch.repeat(length));
    const before = this.text[start - 1] ?? ' ';
    const after = this.text[this.at] ?? ' ';
    const opens = flanks(after, before);
    const closes = flanks(before, after);
    const word = ch === '_'; // snake_case is not emphasis
    const canOpen = opens && (!word || !closes || PUNCTUATION.test(before));
    const canClose = closes && (!word || !opens || PUNCTUATION.test(after));
    this.items.push({ type: 'run', ch, count: length, length, canOpen, canClose, opens: [], closes: [] });
  }

  open(image) {
    this.brackets.push({ index: this.items.length, image });
    this.items.push({ type: 'text', text: image ? '![' : '[' });
    this.at += image ? 2 : 1;
    this.items.push({ type: 'text', text: '' }); // so that what follows does not join the bracket's own text
  }

  close() {
    const opener = this.brackets.pop();
    const dead = this.brackets.length < this.deadBelow;
    this.deadBelow = Math.min(this.deadBelow, this.brackets.length);
    if (!opener || (dead && !opener.image)) return this.literal(1);
    const target = this.target(this.at + 1);
    if (!target) return this.literal(1);
    const inside = this.items.splice(opener.index).slice(1);
    if (opener.image) {
      this.items.push({ type: 'image', href: target.href, alt: plain(inside).slice(0, LONGEST_ALT) });
    } else {
      // A bare URL or an image within the text of a link is text: links do not nest.
      const flat = inside.flatMap((node) => (node.type === 'link' || node.type === 'image' ? textOf(node) : [node]));
      this.items.push({ type: 'link', href: target.href, children: nest(flat, false) });
      this.deadBelow = this.brackets.length;
    }
    this.at = target.end;
  }

  /** What "(destination "title")" at `from` says, or null. */
  target(from) {
    const text = this.text;
    if (text[from] !== '(') return null;
    let at = skipSpace(text, from + 1);
    let href = '';
    if (text[at] === '<') {
      const start = (at += 1);
      while (at < text.length && !'<>\n'.includes(text[at])) at += 1;
      if (text[at] !== '>') return this.cutTarget(at);
      href = text.slice(start, at);
      at += 1;
    } else {
      const start = at;
      let depth = 0;
      for (; at < text.length && !SPACE.test(text[at]); at += 1) {
        if (text[at] === '\\' && PUNCTUATION.test(text[at + 1] ?? '')) at += 1;
        else if (text[at] === '(' && ++depth > MAX_PARENTHESES) return null;
        else if (text[at] === ')' && --depth < 0) break;
      }
      href = text.slice(start, at).replace(/\\([!-/:-@[-`{-~])/g, '$1');
    }
    at = skipSpace(text, at);
    if (text[at] === '"' || text[at] === "'") {
      const end = text.indexOf(text[at], at + 1);
      if (end < 0) return this.cutTarget(text.length);
      at = skipSpace(text, end + 1);
    }
    return text[at] === ')' ? { href, end: at + 1 } : this.cutTarget(at);
  }

  /** A destination that the end of the text cuts is not shown while the rest of it is on its way. */
  cutTarget(at) {
    return this.unfinished && at >= this.text.length ? { href: '', end: at } : null;
  }

  angle() {
    ANGLE_URL.lastIndex = LINE_BREAK_TAG.lastIndex = this.at;
    const url = ANGLE_URL.exec(this.text);
    if (url) {
      this.items.push({ type: 'link', href: url[1], children: [{ type: 'text', text: url[1] }] });
      this.at += url[0].length;
      return;
    }
    const tag = LINE_BREAK_TAG.exec(this.text); // the one tag that models write on purpose, in table cells
    if (!tag) return this.literal(1);
    this.items.push({ type: 'break' });
    this.at += tag[0].length;
  }

  entity() {
    ENTITY.lastIndex = this.at;
    const match = ENTITY.exec(this.text);
    if (!match) return this.literal(1);
    const [whole, decimal, hex, name] = match;
    let character = whole;
    if (name) {
      if (Object.hasOwn(NAMED, name)) character = NAMED[name];
    } else {
      const code = decimal ? Number(decimal) : parseInt(hex, 16);
      const valid = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
      character = valid ? String.fromCodePoint(code) : '\ufffd';
    }
    this.addText(character);
    this.at += whole.length;
  }

  bareUrl() {
    URL_TEXT.lastIndex = this.at;
    const match = /\w/.test(this.text[this.at - 1] ?? '') ? null : URL_TEXT.exec(this.text);
    if (!match) return this.literal(4); // "http": the rest is ordinary text
    const url = trimUrl(match[0]);
    this.items.push({ type: 'link', href: url, children: [{ type: 'text', text: url }] });
    this.at += url.length;
  }
}

/** Whether a run of delimiters leans on `inner`, with `outer` on its other side. */
function flanks(inner, outer) {
  if (SPACE.test(inner)) return false;
  // Chinese puts no space after a quote or a full stop, so a neighbour in a wide script counts as a border of words.
  return !PUNCTUATION.test(inner) || SPACE.test(outer) || PUNCTUATION.test(outer) || WIDE.test(outer);
}

function skipSpace(text, at) {
  while (at < text.length && SPACE.test(text[at])) at += 1;
  return at;
}

/** A URL in running text without the punctuation of its sentence, and without a bracket that was opened before it. */
function trimUrl(url) {
  let open = 0;
  for (const ch of url) open += ch === '(' ? 1 : ch === ')' ? -1 : 0;
  let end = url.length;
  for (; end > 0; end -= 1) {
    const ch = url[end - 1];
    if (ch === ')' && open < 0) open += 1;
    else if (!".,;:!?'*_~".includes(ch)) break;
  }
  return url.slice(0, end);
}

const textOf = (node) => [{ type: 'text', text: plain([node]) }];

/** The text of nodes without their marks; runs of delimiters count as what they are. */
export function plain(nodes) {
  return nodes
    .map((node) => {
      if (node.type === 'run') return node.ch.repeat(node.count);
      if (node.type === 'break') return ' ';
      if (node.type === 'image') return node.alt;
      return node.children ? plain(node.children) : node.text;
    })
    .join('');
}

/** Matches runs of delimiters with each other, then builds the tree: CommonMark's "process emphasis". */
function nest(items, unfinished) {
  const runs = items.filter((item) => item.type === 'run');
  const bottom = new Map(); // kind of closer -> no opener for it lies at or below this place
  const stack = []; // runs that may still open
  for (const closer of runs) {
    while (closer.canClose && closer.count) {
      const kind = `${closer.ch}${closer.canOpen}${closer.length % 3}`;
      const floor = bottom.get(kind) ?? 0;
      let index = stack.length - 1;
      while (index >= floor && !matches(stack[index], closer)) index -= 1;
      if (index < floor) {
        bottom.set(kind, stack.length);
        break;
      }
      pair(stack[index], closer);
      stack.length = stack[index].count ? index + 1 : index;
      for (const [key, value] of bottom) if (value > stack.length) bottom.set(key, stack.length);
    }
    if (closer.canOpen && closer.count) stack.push(closer);
  }
  if (unfinished) for (const run of stack) closeAtEnd(run);
  return build(items);
}

function matches(opener, closer) {
  if (opener.ch !== closer.ch) return false;
  if (opener.ch === '~') return true;
  const odd = (opener.canClose || closer.canOpen) && (opener.length + closer.length) % 3 === 0;
  return !odd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function pair(opener, closer) {
  const size = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
  const type = opener.ch === '~' ? 'del' : size === 2 ? 'strong' : 'em';
  opener.opens.push(type);
  closer.closes.push(type);
  opener.count -= size;
  closer.count -= size;
}

function closeAtEnd(run) {
  if (run.ch !== '~' && run.count % 2) run.opens.push('em');
  for (let pairs = Math.min(run.count >> 1, MAX_NESTED); pairs > 0; pairs -= 1) run.opens.push(run.ch === '~' ? 'del' : 'strong');
  run.count = 0; // build closes whatever is open when the items end
}

function build(items) {
  const root = [];
  const open = [root];
  const push = (node) => open[open.length - 1].push(node);
  for (const item of items) {
    if (item.type !== 'run') {
      if (item.text !== '') push(item);
      continue;
    }
    for (let left = item.closes.length; left > 0; left -= 1) open.pop();
    if (item.count) push({ type: 'text', text: item.ch.repeat(item.count) });
    for (const type of item.opens.reverse()) {
      if (open.length > MAX_NESTED) {
        open.push(open[open.length - 1]); // too deep to show: the text is, its emphasis isn't
        continue;
      }
      const node = { type, children: [] };
      push(node);
      open.push(node.children);
    }
  }
  return root;
}
