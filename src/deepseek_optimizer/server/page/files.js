// Documents attached to a message: they are chosen, uploaded, and shown as chips. A file as plain data, as stored in conversations:
// {id, name, size, pages, gone}; `gone`: the server no longer has it.

import { announce } from './announce.js';
import { ApiError, deleteFile, uploadFile } from './api.js';
import { byId, el, icon, iconButton } from './dom.js';
import { describeError } from './errors.js';
import { bytes, number, t } from './i18n.js';
import { forget, recall, remember } from './preferences.js';

/** A file as a chip; `below`: its second line; `remove`: the action of its remove button, if it has one. */
export function chip({ name }, below, { remove = null, failed = false } = {}) {
  return el(
    `li.chip${failed ? '.failed' : ''}`,
    {},
    icon(failed ? 'alert' : 'file'),
    el('span.chip-text', {}, el('bdi.chip-name', { title: name }, name), el('span.chip-below', {}, below)),
    remove && iconButton('close', t('removeFile', { name }), remove),
  );
}

/** "1.2 MB · 12 pages" */
export function factsOf({ size, pages, gone }) {
  if (gone) return t('fileGone');
  const count = pages ? t(pages === 1 ? 'onePage' : 'pages', { n: number(pages) }) : '';
  return [bytes(size), count].filter(Boolean).join(' · ');
}

/** The chips above the message box. */
export class Attachments {
  /** `actions`: {key() -> the API key, maxBytes() -> maximum bytes of a file or null, changed(), refused() if the key is rejected}. */
  constructor(actions) {
    Object.assign(this, { actions, items: [] });
    this.list = byId('files');
    this.input = byId('file-input');
    byId('attach').addEventListener('click', () => this.input.click());
    this.input.addEventListener('change', () => {
      this.add(this.input.files);
      this.input.value = ''; // allows choosing the same file again
    });
    this.listenForDrops();
  }

  listenForDrops() {
    const veil = byId('drop');
    const brings = (event) => event.dataTransfer?.types.includes('Files') && !document.querySelector('dialog[open]');
    const on = (type, action) =>
      window.addEventListener(type, (event) => {
        if (!brings(event)) return;
        event.preventDefault(); // otherwise the browser opens the file instead of the page
        action(event);
      });
    on('dragenter', () => (veil.hidden = false));
    on('dragover', (event) => (event.dataTransfer.dropEffect = 'copy'));
    on('drop', (event) => {
      veil.hidden = true;
      this.add(event.dataTransfer.files);
    });
    window.addEventListener('dragleave', (event) => event.relatedTarget === null && (veil.hidden = true)); // the pointer left the window
    byId('message').addEventListener('paste', (event) => {
      if (!event.clipboardData?.files.length || event.clipboardData.types.includes('text/plain')) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
  }

  get sending() {
    return this.items.some((item) => item.state === 'sending');
  }

  /** The files that have been uploaded. */
  get ready() {
    return this.items.filter((item) => item.state === 'ready').map(({ id, name, size, pages }) => ({ id, name, size, pages }));
  }

  /** Switches to another conversation's draft: files that were uploaded and not used yet are restored, also after a reload. */
  open(draft) {
    for (const item of this.items) item.controller?.abort();
    this.draft = `${draft}.files`;
    try {
      const kept = JSON.parse(recall(this.draft, 'sessionStorage') ?? '[]');
      this.items = kept.filter((file) => typeof file?.id === 'string').map((file) => ({ ...file, state: 'ready' }));
    } catch {
      this.items = [];
    }
    this.show();
  }

  /** Removes the files after they were sent with a message. */
  clear() {
    this.items = [];
    this.changed();
  }

  add(files) {
    for (const file of files) this.send(file);
    byId('message').focus();
  }

  async send(file) {
    const item = { name: file.name, size: file.size, state: 'sending', part: 0, controller: new AbortController() };
    this.items.push(item);
    this.changed();
    const maxBytes = this.actions.maxBytes();
    try {
      if (maxBytes !== null && file.size > maxBytes) throw new ApiError('http', { status: 413, message: t('fileMost', { size: bytes(maxBytes) }) });
      const { signal } = item.controller;
      const found = await uploadFile(file, this.actions.key(), signal, (part) => this.progressed(item, part));
      Object.assign(item, { id: found.id, name: String(found.filename ?? file.name), pages: found.pages ?? null, state: 'ready' });
      announce(t('announceFile', { name: item.name }));
    } catch (error) {
      if (item.controller.signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      Object.assign(item, { state: 'failed', error: wordsFor(error, file.name) });
      announce(`${item.name}: ${item.error}`);
      if (error.status === 401) this.actions.refused();
    }
    this.changed();
  }

  progressed(item, part) {
    item.part = part;
    const bar = this.list.querySelector(`progress[data-item="${this.items.indexOf(item)}"]`);
    if (bar && part < 1) bar.value = part;
    else this.show();
  }

  remove(item) {
    item.controller?.abort();
    this.items = this.items.filter((one) => one !== item);
    if (item.state === 'ready') deleteFile(item.id, this.actions.key());
    this.changed();
    byId('message').focus();
  }

  changed() {
    const { ready } = this;
    if (ready.length) remember(this.draft, JSON.stringify(ready), 'sessionStorage');
    else forget(this.draft);
    this.show();
    this.actions.changed();
  }

  show() {
    this.list.hidden = !this.items.length;
    this.list.replaceChildren(
      ...this.items.map((item, index) => chip(item, below(item, index), { remove: () => this.remove(item), failed: item.state === 'failed' })),
    );
  }
}

function below(item, index) {
  if (item.state === 'failed') return item.error;
  if (item.state === 'ready') return factsOf(item);
  if (item.part >= 1) return t('fileReading');
  return el('progress', { max: 1, value: item.part, 'data-item': index, 'aria-label': t('fileSending', { name: item.name }) });
}

/** Why a file was not accepted; the server's message says what is wrong with it. */
function wordsFor(error, name) {
  const { status, message } = error;
  const text = message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message;
  if (status === 413) return t('fileTooLarge', { text });
  return status === 400 || status === 501 ? t('fileUnreadable', { text }) : describeError(error).title;
}
