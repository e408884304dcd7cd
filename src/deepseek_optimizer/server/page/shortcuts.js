// The page's keyboard shortcuts, listed in the dialog that Ctrl+/ opens (⌘ on a Mac).

import { isComposing } from './composer.js';

/** `actions`: stop() and closeDrawer() -> whether there was anything to do; newChat, sidebar, search, focus, settings, shortcuts. */
export function listen(actions) {
  document.addEventListener('keydown', (event) => {
    if (isComposing(event) || document.querySelector('dialog[open]')) return; // a dialog has its own keys
    const name = nameOf(event);
    if (!name) return;
    if (name === 'escape') {
      if (document.querySelector('[popover]:popover-open')) return; // the browser closes it
      if (actions.closeDrawer() || actions.stop()) event.preventDefault();
      return;
    }
    event.preventDefault();
    actions[name]();
  });
}

function nameOf(event) {
  if (event.key === 'Escape') return event.shiftKey ? 'focus' : 'escape';
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return null;
  if (event.shiftKey) return { KeyO: 'newChat', KeyS: 'sidebar' }[event.code] ?? null;
  return { '/': 'shortcuts', ',': 'settings', k: 'search' }[event.key] ?? null;
}
