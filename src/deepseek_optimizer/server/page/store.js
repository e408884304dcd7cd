// Stores conversations in IndexedDB, and notifies other tabs of this page of changes. If the browser does not allow it, they last
// as long as the page, and `lasting` is false.

const NAME = 'deepseek-optimizer-chat';
const TABLE = 'conversations';
const UNFINISHED = 'dso.unfinished';

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function openDatabase() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: 'id' });
    return await done(request);
  } catch {
    return null;
  }
}

export class Store {
  static async open() {
    return new Store(await openDatabase());
  }

  constructor(database) {
    this.database = database;
    this.lasting = database !== null;
    this.channel = typeof BroadcastChannel === 'function' ? new BroadcastChannel(NAME) : null;
  }

  /** All conversations, including the messages saved by `keepUnfinished`. */
  async all() {
    if (!this.database) return [];
    const conversations = await done(this.table('readonly').getAll());
    for (const { id, message } of takeUnfinished()) {
      const messages = conversations.find((one) => one.id === id)?.messages ?? [];
      const index = messages.findIndex((one) => one.id === message?.id);
      if (index >= 0) messages[index] = message;
    }
    return conversations;
  }

  async get(id) {
    return this.database ? done(this.table('readonly').get(id)) : undefined;
  }

  async put(conversation) {
    if (this.database) {
      const table = this.table('readwrite');
      const written = done(table.put(conversation));
      table.transaction.commit?.(); // at once: the page may be closing
      await written;
    }
    this.channel?.postMessage({ changed: conversation.id });
  }

  async delete(id) {
    if (this.database) await done(this.table('readwrite').delete(id));
    this.channel?.postMessage({ deleted: id });
  }

  /** Calls back with {changed: id} or {deleted: id} when another tab did that. */
  watch(callback) {
    if (this.channel) this.channel.onmessage = ({ data }) => callback(data);
  }

  table(mode) {
    return this.database.transaction(TABLE, mode).objectStore(TABLE);
  }
}

/** Saves incomplete answers, [{id of the conversation, message}], when the page is closed: IndexedDB may not finish in time. */
export function keepUnfinished(answers) {
  try {
    if (answers.length) localStorage.setItem(UNFINISHED, JSON.stringify(answers));
  } catch {
    // full or not allowed: the last save to the database, a moment ago, must suffice
  }
}

function takeUnfinished() {
  try {
    const saved = JSON.parse(localStorage.getItem(UNFINISHED) ?? '[]');
    localStorage.removeItem(UNFINISHED);
    return Array.isArray(saved) ? saved : [];
  } catch {
    return [];
  }
}
