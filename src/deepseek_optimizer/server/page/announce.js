// Announces events to screen readers in one polite live region; never single tokens.

import { byId } from './dom.js';

export function announce(text) {
  const region = byId('announcer');
  region.textContent = '';
  // In a later frame, since repeating the same text would be no change and would not be announced.
  setTimeout(() => (region.textContent = text), 50);
}
