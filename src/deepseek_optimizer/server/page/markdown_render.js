// Converts markdown-it's tokens to DOM nodes. A model's output is untrusted: every text becomes a text node, only the tags named in
// this file (and, for formulas, in math.js) are created, and the only attribute with content from the model is the href of a link
// that safeUrl accepts.

import { copyText } from './clipboard.js';
import { el, icon } from './dom.js';
import { t } from './i18n.js';

const LONGEST_URL = 2000;
const LONGEST_SHOWN = 80;
const LONGEST_LANGUAGE = 40;
const DEEPEST = 60; // nesting of elements; deeper content goes into their ancestors, since browsers cannot lay out arbitrary depth

/** The URL if `href` is an absolute http, https or mailto URL; null otherwise (javascript:, data:, relative, ...). */
export function safeUrl(href) {
  if (href.length > LONGEST_URL) return null;
  try {
    const url = new URL(href); // no base: a relative URL would point to this server
    return ['http:', 'https:', 'mailto:'].includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}

const plain = (name) => () => ({ node: el(name) });

/**
 * Functions that open an element: {node, inner: the parent of its content if not `node`, auto: its direction follows its text,
 * close: called with its parent when it is complete}.
 */
const OPEN = {
  paragraph_open: (token) => (token.hidden ? null : { node: el('p'), auto: true }),
  heading_open({ tag }) {
    // The page has its own headings, so a model's first level becomes the third; its class determines its look.
    const level = Number(tag[1]);
    return { node: el(`h${Math.min(level + 2, 6)}.level-${level}`), auto: true };
  },
  blockquote_open: plain('blockquote'),
  bullet_list_open: plain('ul'),
  ordered_list_open: (token) => ({ node: el('ol', { start: /^\d{1,9}$/.test(token.attrGet('start')) && token.attrGet('start') }) }),
  list_item_open({ meta }) {
    if (!meta) return { node: el('li'), auto: true };
    const { checked } = meta;
    const box = el('input', { type: 'checkbox', disabled: true, checked, 'aria-label': t(checked ? 'taskDone' : 'taskOpen') });
    return { node: el('li.task', {}, box), auto: true };
  },
  table_open() {
    const inner = el('table');
    return { node: el('div.table', { tabindex: 0, role: 'group', 'aria-label': t('table') }, inner), inner };
  },
  thead_open: plain('thead'),
  tbody_open: plain('tbody'),
  tr_open: plain('tr'),
  th_open: (token) => ({ node: el('th', { class: alignmentOf(token), scope: 'col' }), auto: true }),
  td_open: (token) => ({ node: el('td', { class: alignmentOf(token) }), auto: true }),
  em_open: plain('em'),
  strong_open: plain('strong'),
  s_open: plain('del'),
  link_open: (token, { inLink }) => (inLink ? null : openLink(token.attrGet('href') ?? '')),
  footnote_reference_open({ meta }, { numbers }) {
    const number = numbers.get(meta.label);
    const inner = el('div.footnote-text');
    return { node: el('div.footnote', { tabindex: -1, 'data-footnote': number }, el('span.footnote-number', {}, `${number}.`), inner), inner };
  },
};

const alignmentOf = (token) => {
  const found = /^text-align:(right|center)$/.exec(token.attrGet('style') ?? '');
  return found && `to-${found[1]}`;
};

/** Tokens without nested content: functions that return an array of nodes. */
const LEAF = {
  inline: (token, context) => renderTokens(token.children, context),
  text: ({ content }) => [document.createTextNode(content)],
  softbreak: () => [el('br')],
  hardbreak: () => [el('br')],
  hr: () => [el('hr')],
  code_inline: ({ content }) => [el('code', { translate: 'no' }, content)],
  fence: (token, context) => [renderCode(token, context)],
  math: (token, { math }) => [formula(token, math)],
  math_block: (token, { math }) => [formula(token, math)],
  image(token, { inLink }) {
    // Loading it would reveal to another server who reads this and when, so its text and URL are shown instead.
    const shown = el('span.image', {}, icon('image'), token.content || t('image'));
    return inLink ? [shown] : linkTo(token.attrGet('src') ?? '', [shown], token.content);
  },
  footnote_ref({ meta }, { numbers }) {
    const number = String(numbers.get(meta.label));
    const button = el('button.footnote-ref', { type: 'button', 'aria-label': t('footnote', { n: number }), onclick: goToFootnote }, number);
    return [el('sup', {}, button)];
  },
  footnote_anchor: () => [],
};

/**
 * The nodes of a list of tokens. `context`: {math(tex, display), highlight(text, language), numbers: footnote label -> number,
 * open: the last block is not complete yet}.
 */
export function renderTokens(tokens, context) {
  const top = { node: document.createDocumentFragment(), inLink: context.inLink, depth: context.depth ?? 0 };
  const frames = [top];
  for (const token of tokens) {
    const frame = frames[frames.length - 1];
    const into = frame.inner ?? frame.node;
    const here = { ...context, inLink: frame.inLink, depth: frame.depth };
    if (token.nesting === 1) {
      const opened = (frame.depth < DEEPEST && OPEN[token.type]?.(token, here)) || { inner: into }; // else into its parent
      frames.push({ ...opened, inLink: frame.inLink || opened.link, depth: frame.depth + 1 });
    } else if (token.nesting === -1) {
      frames.pop();
      close(frame, frames[frames.length - 1]);
    } else into.append(...(LEAF[token.type]?.(token, here) ?? [document.createTextNode(token.content)]));
  }
  return [...top.node.childNodes];
}

function close({ node, auto, close: closed }, above) {
  const parent = above.inner ?? above.node;
  if (auto) node.dir = 'auto'; // at the end: Chromium would scan the whole text again for each appended node
  if (node) parent.append(node);
  closed?.(parent);
}

/** Code with the name of its language and a copy button, which copies the current text. */
function renderCode(token, { highlight, open }) {
  const code = el('code', { translate: 'no' });
  const language = languageOf(token);
  const label = el('span', {}, t('copy'));
  const button = el(
    'button.copy-code',
    { type: 'button', 'aria-label': t('copyCode'), onclick: () => copyText(code.textContent, label) },
    icon('copy'),
    label,
  );
  const head = el('div.code-head', {}, el('span.code-language', {}, language || t('code')), button);
  const pre = el('pre', { tabindex: 0, role: 'group', 'aria-label': t('code') }, code);
  // Not highlighted while it grows: highlighting all of it again for each line would take quadratic time.
  code.append(...((!open && highlight(codeOf(token), language)) || [document.createTextNode(codeOf(token))]));
  return el('div.code', { dir: 'ltr' }, head, pre);
}

const codeOf = ({ content }) => content.replace(/\n$/, '');
const languageOf = ({ info }) => info.trim().split(/\s/)[0].slice(0, LONGEST_LANGUAGE);

/** Extends the element of an unfinished code block; only new text is added. */
export function updateCode(node, token) {
  const shown = node.querySelector('code').firstChild;
  const content = codeOf(token);
  if (content.startsWith(shown.data)) shown.appendData(content.slice(shown.data.length));
  else shown.data = content;
}

/** A formula, or its TeX if it cannot be rendered (yet). */
function formula({ content, meta }, math) {
  const set = meta.open ? null : math(content, meta.display);
  const name = meta.display ? 'div' : 'span';
  if (set) return el(`${name}.math`, { translate: 'no', tabindex: meta.display && 0 }, set);
  return el(`${name}.math.source`, { translate: 'no', tabindex: meta.display && 0 }, content);
}

function openLink(href) {
  const url = safeUrl(href);
  if (!url) return { node: document.createDocumentFragment(), link: true, close: (parent) => href && parent.append(target(href)) };
  const props = { href: url.href, target: '_blank', rel: 'noopener noreferrer', title: url.href, referrerpolicy: 'no-referrer' };
  const node = el('a', props);
  return { node, link: true, close: (parent) => saysWhere(url, node.textContent) || parent.append(target(hostOf(url))) };
}

function linkTo(href, children, shown) {
  const url = safeUrl(href);
  if (!url) return href ? [...children, target(href)] : children;
  const { node } = openLink(href);
  node.append(...children);
  return saysWhere(url, shown) ? [node] : [node, target(hostOf(url))];
}

/** Whether a link's text equals its URL as the browser writes it, in which look-alike letters of other scripts are visible. */
function saysWhere(url, shown) {
  const bare = url.href.replace(/\/$/, '');
  return [url.href, bare, bare.replace(/^(https?:\/\/|mailto:)/, '')].includes(shown) && !url.username;
}

const hostOf = (url) => (url.protocol === 'mailto:' ? url.href : url.host);

const target = (address) => {
  const shown = address.length > LONGEST_SHOWN ? `${address.slice(0, LONGEST_SHOWN)}…` : address;
  return el('bdi.target', { dir: 'ltr' }, ` (${shown})`);
};

/** Moves the focus instead of navigating, since the page's URLs identify conversations. */
function goToFootnote({ currentTarget }) {
  const notes = currentTarget.closest('.markdown').querySelectorAll('.footnote');
  const note = [...notes].find((one) => one.dataset.footnote === currentTarget.textContent);
  note?.focus();
}
