// Values stored in the browser besides conversations: theme, language, API key, drafts. If storage is not allowed or full, they
// last as long as the page.

const memory = new Map(); // storage and name -> value

function attempt(action) {
  try {
    return action();
  } catch {
    return undefined;
  }
}

export function remember(name, value, storage = 'localStorage') {
  memory.set(`${storage}.${name}`, value);
  attempt(() => window[storage].setItem(`dso.${name}`, value));
}

export function recall(name, storage = 'localStorage') {
  return attempt(() => window[storage].getItem(`dso.${name}`)) ?? memory.get(`${storage}.${name}`) ?? null;
}

export function forget(name) {
  for (const storage of ['localStorage', 'sessionStorage']) {
    memory.delete(`${storage}.${name}`);
    attempt(() => window[storage].removeItem(`dso.${name}`));
  }
}

/** The API key: this tab's, or else the one stored on this device. */
export const apiKey = () => recall('key', 'sessionStorage') ?? recall('key') ?? '';

export function setApiKey(key, keep) {
  forget('key');
  if (key) remember('key', key, keep ? 'localStorage' : 'sessionStorage');
}

/** Switches to the next of system, light, dark; the page changes at once. Returns the choice. */
export function nextTheme() {
  const order = ['system', 'light', 'dark'];
  const next = order[(order.indexOf(theme()) + 1) % order.length];
  if (next === 'system') {
    forget('theme');
    delete document.documentElement.dataset.theme;
  } else {
    remember('theme', next);
    document.documentElement.dataset.theme = next;
  }
  return next;
}

export const theme = () => document.documentElement.dataset.theme ?? 'system';
