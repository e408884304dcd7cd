// Copying that also works over plain HTTP from another machine, where browsers do not provide navigator.clipboard.

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
      // refused: the fallback may still work
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

/** Copies, and confirms it: in `label` for a moment, and with an announcement to screen readers. */
export async function copyText(text, label) {
  const said = t((await write(text)) ? 'copied' : 'copyFailed');
  announce(said);
  if (!label) return;
  label.textContent = said;
  setTimeout(() => (label.textContent = t('copy')), SHOWN_MS);
}
