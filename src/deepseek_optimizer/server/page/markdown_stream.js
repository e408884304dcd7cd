// Markdown that grows: what is finished is parsed and rendered once, only the last block again.

import { parseBlocks } from './markdown_blocks.js';
import { renderBlock, updateCode } from './markdown_render.js';

export class MarkdownStream {
  /** Renders into `root`, which is this object's own from now on. */
  constructor(root) {
    this.root = root;
    this.lines = ['']; // from the first line of the last block on; the last one has no newline yet
    this.held = '';
    this.tail = []; // [{block, node}] of those lines
    this.rendered = 0; // blocks made into nodes so far: how much work was done
  }

  append(text) {
    let whole = this.held + text;
    this.held = whole.endsWith('\r') ? '\r' : ''; // its newline may be the next piece's first character
    if (this.held) whole = whole.slice(0, -1);
    const [first, ...rest] = whole.replace(/\r\n?/g, '\n').replace(/\0/g, '\ufffd').split('\n');
    this.lines[this.lines.length - 1] += first;
    for (const line of rest) this.lines.push(line);
    this.dirty = true;
  }

  /** Brings the DOM up to date; `unfinished` while more text may come. */
  render(unfinished = true) {
    if (!this.dirty && unfinished === this.unfinished) return;
    this.dirty = false;
    this.unfinished = unfinished;
    const blocks = parseBlocks(this.lines.map(expandTabs));
    for (const old of this.tail.slice(blocks.length)) old.node.remove();
    this.tail = blocks.map((block, index) => {
      const old = this.tail[index];
      const node = this.nodeOf(block, old, unfinished && index === blocks.length - 1);
      if (!old) this.root.append(node);
      else if (node !== old.node) old.node.replaceWith(node);
      return { block, node };
    });
    this.settle();
  }

  nodeOf(block, old, unfinished) {
    if (block.kind === 'code' && old?.block.kind === 'code' && old.block.info === block.info) {
      updateCode(old.node, block);
      return old.node;
    }
    this.rendered += 1;
    return renderBlock(block, unfinished);
  }

  /** Lets go of the blocks that no further text can change: those that another one follows whose first line is complete. */
  settle() {
    const complete = this.lines.length - 1;
    let last = this.tail.length - 1;
    while (last > 0 && this.tail[last].block.from >= complete) last -= 1;
    if (last <= 0) return;
    const from = this.tail[last].block.from;
    this.lines = this.lines.slice(from);
    this.tail = this.tail.slice(last);
    for (const { block } of this.tail) {
      block.from -= from;
      block.end -= from;
    }
  }
}

/** Tabs at the start of a line as four columns, so that nesting is counted in spaces; elsewhere they stay. */
function expandTabs(line) {
  if (!line.includes('\t')) return line;
  const inside = line.trimStart();
  let lead = '';
  for (const ch of line.slice(0, line.length - inside.length)) lead += ch === '\t' ? ' '.repeat(4 - (lead.length % 4)) : ch;
  return lead + inside;
}
