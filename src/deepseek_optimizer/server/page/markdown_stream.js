// Incremental Markdown: finished blocks are parsed and rendered once, only the last block repeatedly.

import { codeHighlighter } from './code_highlight.js';
import { mathSetter } from './math.js';
import { createParser } from './markdown_parser.js';
import { renderTokens, updateCode } from './markdown_render.js';

const LONGEST_BLOCK = 200_000; // characters; a longer block is shown as text, so that no answer can freeze the page

/** Returns `makeStream(root)`, which creates a stream that renders into `root`; nothing else may change `root`. */
export function streamMaker(libraries) {
  if (!libraries) return (root) => new TextStream(root);
  const parser = createParser(libraries);
  const context = { math: mathSetter(libraries.katex), highlight: codeHighlighter(libraries.hljs) };
  return (root) => new MarkdownStream(root, parser, context);
}

/** Shows plain text, for an installation without the libraries. */
class TextStream {
  constructor(root) {
    root.classList.add('as-text');
    root.dir = 'auto';
    this.node = root.appendChild(document.createTextNode(''));
  }

  append(text) {
    this.node.appendData(text);
  }

  render() {}
}

class MarkdownStream {
  constructor(root, parser, context) {
    Object.assign(this, { root, parser, context });
    this.lines = ['']; // from the first line of the last block; the last line has no newline yet
    this.held = '';
    this.tail = []; // the blocks of those lines: {tokens, from, source, numbers, open, node}
    this.numbers = new Map(); // footnote label -> number, for the settled blocks
    this.referring = []; // settled blocks that may refer to a footnote that is not defined yet
    this.rendered = 0; // number of blocks rendered so far, a measure of work
  }

  append(text) {
    let whole = this.held + text;
    this.held = whole.endsWith('\r') ? '\r' : ''; // its newline may be the first character of the next chunk
    if (this.held) whole = whole.slice(0, -1);
    const [first, ...rest] = whole.replace(/\r\n?/g, '\n').split('\n');
    this.lines[this.lines.length - 1] += first;
    for (const line of rest) this.lines.push(line);
    this.dirty = true;
  }

  /** Updates the DOM; `unfinished`: more text may follow. */
  render(unfinished = true) {
    if (!this.dirty && unfinished === this.unfinished) return;
    this.dirty = false;
    this.unfinished = unfinished;
    const blocks = this.blocks(unfinished);
    for (const old of this.tail.slice(blocks.length)) old.node.remove();
    this.tail = blocks.map((block, index) => {
      const old = this.tail[index];
      const node = this.nodeOf(block, old);
      if (!old) this.root.append(node);
      else if (node !== old.node) old.node.replaceWith(node);
      return { ...block, node };
    });
    this.settle(unfinished);
  }

  /** The blocks of the lines that are not settled. */
  blocks(unfinished) {
    const text = this.lines.join('\n');
    if (text.length > LONGEST_BLOCK) return [this.textBlock(text)];
    const blocks = split(this.parser.parse(text, { labels: this.numbers.keys(), unfinished }));
    const numbers = new Map(this.numbers);
    for (const { tokens } of blocks) for (const label of definedIn(tokens)) if (!numbers.has(label)) numbers.set(label, numbers.size + 1);
    for (const [index, block] of blocks.entries()) {
      const end = blocks[index + 1]?.from;
      block.source = this.lines.slice(block.from, end).join('\n');
      block.numbers = numbers;
      block.open = unfinished && end === undefined;
    }
    return blocks;
  }

  textBlock(text) {
    const token = { type: 'text', nesting: 0, content: text };
    return { tokens: [token], from: 0, source: text, numbers: this.numbers, open: false };
  }

  nodeOf(block, old) {
    if (old && old.source === block.source && old.open === block.open && !changedNotes(block, old)) return old.node;
    const [token] = block.tokens;
    if (token.type === 'fence' && block.open && old?.open && old.tokens[0].type === 'fence' && old.tokens[0].info === token.info) {
      updateCode(old.node, token);
      return old.node;
    }
    return this.make(block);
  }

  make(block) {
    this.rendered += 1;
    const nodes = renderTokens(block.tokens, { ...this.context, numbers: block.numbers, open: block.open });
    if (nodes.length === 1 && nodes[0].nodeType === Node.ELEMENT_NODE) return nodes[0];
    const wrapper = document.createElement('div');
    wrapper.append(...nodes);
    return wrapper;
  }

  /** Settles the blocks that further text cannot change: those followed by another block whose first line is complete. */
  settle(unfinished) {
    const complete = this.lines.length - 1;
    let last = this.tail.length - 1;
    while (last > 0 && this.tail[last].from >= complete) last -= 1;
    const settled = this.tail.slice(0, unfinished ? Math.max(last, 0) : this.tail.length);
    this.define(settled);
    if (!unfinished || last <= 0) return;
    const { from } = this.tail[last];
    this.referring.push(...settled.filter(({ source }) => source.includes('[^')));
    this.lines = this.lines.slice(from);
    this.tail = this.tail.slice(last);
    for (const block of this.tail) block.from -= from;
  }

  /** Collects the footnotes that settled blocks define; references to them in earlier blocks become links. */
  define(settled) {
    const before = this.numbers.size;
    for (const { tokens } of settled) for (const label of definedIn(tokens)) if (!this.numbers.has(label)) this.numbers.set(label, this.numbers.size + 1);
    if (this.numbers.size === before) return;
    const labels = [...this.numbers.keys()].slice(before);
    for (const block of this.referring) {
      if (!labels.some((label) => block.source.includes(`[^${label}]`))) continue;
      const [{ tokens }] = split(this.parser.parse(block.source, { labels: this.numbers.keys() }));
      const node = this.make({ ...block, tokens, numbers: this.numbers });
      block.node.replaceWith(node);
      block.node = node;
    }
  }
}

/** Groups tokens into top-level blocks, each with `from`, its first line. */
function split(tokens) {
  const blocks = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) blocks.push({ tokens: [], from: null });
    const block = blocks[blocks.length - 1];
    block.tokens.push(token);
    block.from ??= token.map?.[0] ?? null;
    depth += token.nesting;
  }
  return blocks;
}

const definedIn = (tokens) => tokens.filter(({ type }) => type === 'footnote_reference_open').map(({ meta }) => meta.label);

const changedNotes = (block, old) => block.numbers.size !== old.numbers.size && block.source.includes('[^');
