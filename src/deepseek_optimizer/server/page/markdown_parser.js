// Parses Markdown to tokens with markdown-it: CommonMark with GitHub's tables, task lists and strikethrough, footnotes and TeX.
//
// Disabled is syntax that models do not intend, or with which a line changes the meaning of an earlier block, which cannot be
// undone in a stream: HTML (shown as text), indented code, underlined headings, link references.

import * as math from './markdown_math.js';
import { finishInline, closeDelimiters } from './markdown_unfinished.js';

const LEFT_OUT = ['code', 'lheading', 'reference', 'html_block', 'html_inline', 'footnote_inline', 'footnote_tail'];
const WIDE = /[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]/; // scripts without spaces between words
const REFERENCE = /\[\^[^\]\s]{1,100}\]/y;
const TASK = /^\[([ xX])\] /;

/** A parser; its `parse(text, { labels, unfinished })` returns markdown-it's tokens. */
export function createParser({ markdownit, footnote }) {
  const md = markdownit({ html: false, breaks: true, linkify: true }).use(footnote).disable(LEFT_OUT);
  md.linkify.set({ fuzzyLink: false, fuzzyEmail: false }).add('ftp:', null).add('//', null);
  md.validateLink = () => true; // the renderer decides, and shows unsafe URLs as text
  md.normalizeLink = md.normalizeLinkText = (url) => url;
  md.inline.State = wideState(md.inline.State);
  md.inline.ruler.before('escape', 'math', math.inlineRule);
  md.inline.ruler2.after('balance_pairs', 'close_delimiters', closeDelimiters);
  md.block.ruler.before('fence', 'math', math.blockRule, { alt: ['paragraph', 'blockquote', 'list'] });
  md.block.ruler.at('footnote_def', withLines(ruleOf(md.block.ruler, 'footnote_def')), { alt: ['paragraph', 'reference'] });
  const reference = ruleOf(md.inline.ruler, 'footnote_ref');
  md.inline.ruler.at('footnote_ref', (state, silent) => isReference(state) && reference(state, silent));
  md.core.ruler.at('inline', inlineRule);
  md.core.ruler.push('tasks', taskRule);
  md.core.ruler.push('trim_links', trimLinksRule);
  return {
    /**
     * `labels`: footnotes that are defined elsewhere, so that references to them are recognized; `unfinished`: more text will
     * follow, so open marks count as closed at its end.
     */
    parse(text, { labels = [], unfinished = false } = {}) {
      const refs = Object.fromEntries([...labels].map((label) => [`:${label}`, -1]));
      return md.parse(text, { footnotes: { refs }, unfinished, atEnd: false });
    },
  };
}

/** Allows emphasis next to scripts without spaces: "**注意：**请看", where CommonMark would require a space. */
function wideState(State) {
  return class extends State {
    scanDelims(start, canSplitWord) {
      const found = super.scanDelims(start, canSplitWord);
      const before = this.src[start - 1] ?? ' ';
      const after = this.src[start + found.length] ?? ' ';
      if (canSplitWord && WIDE.test(before) && after.trim()) found.can_open = true;
      if (canSplitWord && WIDE.test(after) && before.trim()) found.can_close = true;
      return found;
    }
  };
}

const ruleOf = (ruler, name) => ruler.__rules__.find((rule) => rule.name === name).fn;

/** Checked first, since the rule itself reads to the end of the word, which takes quadratic time for "[^[^[^...". */
function isReference({ src, pos }) {
  REFERENCE.lastIndex = pos;
  return REFERENCE.test(src);
}

/** A block rule that also sets the line range of its first token, as markdown-it's rules do. */
const withLines = (rule) => (state, start, end, silent) => {
  const at = state.tokens.length;
  const found = rule(state, start, end, silent);
  if (found && !silent) state.tokens[at].map = [start, state.line];
  return found;
};

/** markdown-it's rule, which also treats the end of an unfinished text differently from the rest. */
function inlineRule({ tokens, md, env }) {
  const lastBlock = tokens.findLastIndex(({ level, nesting }) => level === 0 && nesting >= 0);
  const last = env.unfinished && tokens.findLast(({ type, content }, index) => index > lastBlock && type === 'inline' && content);
  for (const token of tokens) {
    if (token.type !== 'inline') continue;
    env.atEnd = token === last;
    md.inline.parse(env.atEnd ? finishInline(token.content) : token.content, md, env, token.children);
  }
  env.atEnd = false;
}

/** "[x] " at the start of a list's item becomes the item's `meta.checked`. */
function taskRule({ tokens }) {
  for (let at = 2; at < tokens.length; at += 1) {
    if (tokens[at].type !== 'inline' || tokens[at - 2].type !== 'list_item_open') continue;
    const first = tokens[at].children[0];
    const task = first?.type === 'text' && TASK.exec(first.content);
    if (!task) continue;
    tokens[at - 2].meta = { checked: task[1] !== ' ' };
    first.content = first.content.slice(4);
  }
}

/** Punctuation at the end of a bare address belongs to the sentence: "(see https://example.org/a.)" */
function trimLinksRule({ tokens, Token }) {
  for (const { children } of tokens) {
    for (let at = 0; children && at + 2 < children.length; at += 1) {
      const [open, text] = [children[at], children[at + 1]];
      if (open.markup !== 'linkify' || open.type !== 'link_open') continue;
      const end = /[.,;:!?'"]+$/.exec(text.content)?.[0];
      if (!end || !open.attrGet('href').endsWith(end)) continue;
      open.attrSet('href', open.attrGet('href').slice(0, -end.length));
      text.content = text.content.slice(0, -end.length);
      const rest = new Token('text', '', 0);
      rest.content = end;
      children.splice(at + 3, 0, rest);
    }
  }
}
