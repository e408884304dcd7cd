// Looks up texts in strings.js. The language is the document's `lang`, which early.js sets from the user's choice or the browser.

import { STRINGS } from './strings.js';
import { remember } from './preferences.js';

export const language = () => (document.documentElement.lang.startsWith('zh') ? 'zh' : 'en');

/** The text of `key`, with {name} replaced by values.name. Throws for an unknown key, which is a bug. */
export function t(key, values = {}) {
  const text = STRINGS[language()][key];
  if (text === undefined) throw new Error(`no text for ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

export function setLanguage(name) {
  document.documentElement.lang = name === 'zh' ? 'zh-CN' : 'en';
  remember('language', document.documentElement.lang);
}

/** Fills in the texts of index.html: data-t is the text, data-t-label the label and tooltip, data-t-placeholder the placeholder. */
export function translate(root = document) {
  document.title = t('title');
  for (const node of root.querySelectorAll('[data-t]')) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll('[data-t-label]')) {
    node.setAttribute('aria-label', t(node.dataset.tLabel));
    if (node.tagName === 'BUTTON') node.title = t(node.dataset.tLabel);
  }
  for (const node of root.querySelectorAll('[data-t-placeholder]')) node.placeholder = t(node.dataset.tPlaceholder);
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(document.documentElement.lang, { maximumFractionDigits: digits }).format(value);

/** "1.2 MB", "7 byte" */
export function bytes(value) {
  const [unit, size] = value < 1e3 ? ['byte', 1] : value < 1e6 ? ['kilobyte', 1e3] : ['megabyte', 1e6];
  const options = { style: 'unit', unit, unitDisplay: 'short', maximumFractionDigits: value < 10 * size ? 1 : 0 };
  return new Intl.NumberFormat(document.documentElement.lang, options).format(value / size);
}

/** Milliseconds as seconds, with more digits for short times. */
export const seconds = (ms) => t('seconds', { n: number(Math.max(ms, 10) / 1000, ms < 1000 ? 2 : ms < 60000 ? 1 : 0) });
