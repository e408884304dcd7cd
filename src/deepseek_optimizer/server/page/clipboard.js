// Copying also where the page came over plain HTTP from another machine: browsers keep navigator.clipboard for secure origins.

import { el } from './dom.js';
import { t } from './i18n.js';
import { announce } from './announce.js';

const SHOWN_MS = 1600;

async function write(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // refused: the old way may still work
    }
  }
  const area = el('textarea.offscreen', { 'aria-hidden': 'true', tabindex: -1 });
  area.value = text;
  const focused = document.activeElement;
  (document.querySelector('dialog[open]') ?? document.body).append(area);
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  focused?.focus?.({ preventScroll: true });
  return copied;
}

/** Copies, and says so: to everyone in `label` for a moment, and politely to those who listen. */
export async function copyText(text, label) {
  const said = t((await write(text)) ? 'copied' : 'copyFailed');
  announce(said);
  if (!label) return;
  label.textContent = said;
  setTimeout(() => (label.textContent = t('copy')), SHOWN_MS);
}
