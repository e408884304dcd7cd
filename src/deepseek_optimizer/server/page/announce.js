// Tells screen readers what happened, in one polite live region: never token by token.

import { byId } from './dom.js';

export function announce(text) {
  const region = byId('announcer');
  region.textContent = '';
  // In a later frame, or the same words twice would be no change and stay unsaid.
  setTimeout(() => (region.textContent = text), 50);
}
