// Blocks to DOM nodes. What a model writes is hostile input: every text becomes a text node, the tags are those named in this file,
// and the only attribute that holds something of the model's is the href of a link that safeUrl let through.

import { el, icon } from './dom.js';
import { copyText } from './clipboard.js';
import { t } from './i18n.js';
import { parseInline, plain } from './markdown_inline.js';

const LONGEST_URL = 2000;
const LONGEST_SHOWN = 80;
const LONGEST_LANGUAGE = 40;

/** The URL where `href` is an absolute http, https or mailto address; null for all else (javascript:, data:, relative, ...). */
export function safeUrl(href) {
  if (href.length > LONGEST_URL) return null;
  try {
    const url = new URL(href); // no base: a relative address would point at this server
    return ['http:', 'https:', 'mailto:'].includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}

/** The element of a block. `unfinished`: the block is the last one of a text that is still coming. */
export function renderBlock(block, unfinished = false) {
  switch (block.kind) {
    case 'heading':
      // The page has headings of its own, so a model's first level is a third one; how it looks follows its class.
      return el(`h${Math.min(block.level + 2, 6)}.level-${block.level}`, { dir: 'auto' }, ...inline(block.text, unfinished));
    case 'paragraph':
      return el('p', { dir: 'auto' }, ...inline(block.text, unfinished));
    case 'code':
      return renderCode(block);
    case 'math':
      return el('div.math', { tabindex: 0, translate: 'no' }, block.text);
    case 'quote':
      return el('blockquote', {}, ...renderAll(block.blocks, unfinished));
    case 'list':
      return renderList(block, unfinished);
    case 'table':
      return renderTable(block, unfinished);
    default:
      return el('hr');
  }
}

export const renderAll = (blocks, unfinished) =>
  blocks.map((block, index) => renderBlock(block, unfinished && index === blocks.length - 1));

/** Code with its language's name and a copy button, which copies what is there when it is pressed. */
function renderCode(block) {
  const code = el('code', { translate: 'no' }, document.createTextNode(block.text));
  const language = block.info.split(/\s/)[0].slice(0, LONGEST_LANGUAGE);
  const label = el('span', {}, t('copy'));
  const button = el(
    'button.copy-code',
    { type: 'button', 'aria-label': t('copyCode'), onclick: () => copyText(code.textContent, label) },
    icon('copy'),
    label,
  );
  const head = el('div.code-head', {}, el('span.code-language', {}, language || t('code')), button);
  const pre = el('pre', { tabindex: 0, role: 'group', 'aria-label': t('code') }, code);
  return el('div.code', { dir: 'ltr' }, head, pre);
}

/** Shows more of an unfinished code block in the element of before: only the text that is new is touched. */
export function updateCode(node, block) {
  const text = node.querySelector('code').firstChild;
  if (block.text.startsWith(text.data)) text.appendData(block.text.slice(text.data.length));
  else text.data = block.text;
}

function renderList(block, unfinished) {
  const last = block.items.length - 1;
  const items = block.items.map((item, index) => renderItem(item, block.loose, unfinished && index === last));
  return el(block.ordered ? 'ol' : 'ul', { start: block.ordered && block.start !== 1 && block.start }, ...items);
}

function renderItem({ blocks, checked }, loose, unfinished) {
  const rendered = renderAll(blocks, unfinished);
  const item = el(checked === null ? 'li' : 'li.task', { dir: 'auto' });
  if (checked !== null) {
    item.append(el('input', { type: 'checkbox', disabled: true, checked, 'aria-label': t(checked ? 'taskDone' : 'taskOpen') }));
  }
  for (const [index, node] of rendered.entries()) {
    if (!loose && blocks[index].kind === 'paragraph') item.append(...node.childNodes);
    else item.append(node);
  }
  return item;
}

function renderTable({ align, head, rows }, unfinished) {
  const cells = (tag, texts, open) =>
    texts.map((text, column) => {
      const props = { class: align[column] && `to-${align[column]}`, scope: tag === 'th' && 'col', dir: 'auto' };
      return el(tag, props, ...inline(text, open && column === texts.length - 1));
    });
  const body = rows.map((row, index) => el('tr', {}, ...cells('td', row, unfinished && index === rows.length - 1)));
  const table = el('table', {}, el('thead', {}, el('tr', {}, ...cells('th', head, false))), el('tbody', {}, ...body));
  return el('div.table', { tabindex: 0, role: 'group', 'aria-label': t('table') }, table);
}

const inline = (text, unfinished) => renderInline(parseInline(text, unfinished));

function renderInline(nodes) {
  return nodes.flatMap((node) => {
    switch (node.type) {
      case 'text':
        return [document.createTextNode(node.text)];
      case 'code':
        return [el('code', { translate: 'no' }, node.text)];
      case 'math':
        return [el('span.math', { translate: 'no' }, node.text)];
      case 'break':
        return [el('br')];
      case 'link':
        return renderLink(node.href, renderInline(node.children), plain(node.children));
      case 'image':
        // Fetching it would tell another server who reads this, and when: its text and address are shown instead.
        return renderLink(node.href, [el('span.image', {}, icon('image'), node.alt || t('image'))], node.alt);
      default:
        return [el(node.type, {}, ...renderInline(node.children))];
    }
  });
}

/** A link that says where it goes where its text doesn't; an address that may not be followed is shown as text. */
function renderLink(href, children, text) {
  const url = safeUrl(href);
  if (!url) return href ? [...children, target(href)] : children;
  const props = { href: url.href, target: '_blank', rel: 'noopener noreferrer', title: url.href, referrerpolicy: 'no-referrer' };
  const link = el('a', props, ...children);
  // Compared with the address as the browser writes it, in which look-alike letters of other scripts are plain to see.
  const bare = url.href.replace(/\/$/, '');
  const plainly = [url.href, bare, bare.replace(/^(https?:\/\/|mailto:)/, '')].includes(text) && !url.username;
  return plainly ? [link] : [link, target(url.protocol === 'mailto:' ? url.href : url.host)];
}

const target = (address) => {
  const shown = address.length > LONGEST_SHOWN ? `${address.slice(0, LONGEST_SHOWN)}…` : address;
  return el('bdi.target', { dir: 'ltr' }, ` (${shown})`);
};
