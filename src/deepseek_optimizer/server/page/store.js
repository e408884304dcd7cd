// Keeps conversations in IndexedDB, and tells other tabs of this page what changed. Where the browser forbids it, they last as long
// as the page: `lasting` says which.

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

  /** All conversations, with what `keepUnfinished` saved put into its place. */
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
      table.transaction.commit?.(); // at once: the page may be on its way out
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

/** Saves half-written answers, [{id of the conversation, message}], while the page goes away: IndexedDB may not get to it in time. */
export function keepUnfinished(answers) {
  try {
    if (answers.length) localStorage.setItem(UNFINISHED, JSON.stringify(answers));
  } catch {
    // full or forbidden: the last save to the database, a moment ago, has to do
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
