// Documents and pictures attached to a message: they are chosen, uploaded or read (see pictures.js), and shown as chips and
// thumbnails. A document as plain data, as stored in conversations: {id, name, size, pages, gone}; `gone`: the server no longer has it.

import { announce } from './announce.js';
import { ApiError, deleteFile, uploadFile } from './api.js';
import { restoredPictures } from './conversation.js';
import { byId, el, icon, iconButton } from './dom.js';
import { describeError } from './errors.js';
import { bytes, number, t, translate } from './i18n.js';
import { openMenu } from './menus.js';
import { isPicture, PictureError, readPicture, thumbnail } from './pictures.js';
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
  /**
   * `actions`: {key() -> the API key, maxBytes() -> maximum bytes of a file or null, sees() -> whether the model takes pictures,
   * room() -> see roomForPictures, changed(), refused() if the key is rejected}.
   */
  constructor(actions) {
    Object.assign(this, { actions, items: [] });
    this.list = byId('files');
    byId('attach').addEventListener('click', (event) => {
      if (this.actions.sees()) openMenu(byId('attach-menu'), event.currentTarget, 'left');
      else byId('file-input').click();
    });
    this.listenForChoices('menu-file', 'file-input', false);
    this.listenForChoices('menu-picture', 'picture-input', true);
    this.listenForChoices('menu-camera', 'camera-input', true);
    this.listenForDrops();
  }

  /** Adds what is chosen in a file input, which an item of the menu opens; `pictures`: whether it is for pictures only. */
  listenForChoices(item, name, pictures) {
    const input = byId(name);
    byId(item).addEventListener('click', () => {
      byId('attach-menu').hidePopover();
      input.click();
    });
    input.addEventListener('change', () => {
      this.add(input.files, pictures);
      input.value = ''; // allows choosing the same file again
    });
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

  /** Shows what the conversation's model takes: documents, or pictures too. */
  showKinds() {
    const sees = this.actions.sees();
    const button = byId('attach');
    Object.assign(button.dataset, { tLabel: sees ? 'attachAny' : 'attach' });
    if (sees) button.setAttribute('aria-haspopup', 'dialog');
    else button.removeAttribute('aria-haspopup');
    const drop = byId('drop').querySelector('span');
    drop.dataset.t = sees ? 'dropAny' : 'dropFiles';
    translate(byId('composer'));
    translate(byId('drop'));
  }

  get sending() {
    return this.items.some((item) => item.state === 'sending');
  }

  /** The files that have been uploaded. */
  get ready() {
    return this.items.filter((item) => item.state === 'ready').map(({ id, name, size, pages }) => ({ id, name, size, pages }));
  }

  /** The pictures that have been read. */
  get pictures() {
    return restoredPictures(this.items.filter((item) => item.state === 'picture'));
  }

  /** Switches to another conversation's draft: files that were uploaded and not used yet are restored, also after a reload. */
  open(draft) {
    for (const item of this.items) item.controller?.abort();
    this.draft = `${draft}.files`;
    try {
      const kept = JSON.parse(recall(this.draft, 'sessionStorage') ?? '[]');
      const files = kept.filter((file) => typeof file?.id === 'string').map((file) => ({ ...file, state: 'ready' }));
      this.items = [...files, ...restoredPictures(kept).map((picture) => ({ ...picture, state: 'picture' }))];
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

  /** Adds documents and pictures; `pictures`: whether all are pictures, even if the browser does not know their types. */
  async add(files, pictures = false) {
    byId('message').focus();
    for (const file of [...files]) {
      if (pictures || (this.actions.sees() && isPicture(file))) await this.addPicture(file); // one after the other, for memory
      else this.send(file);
    }
  }

  async addPicture(file) {
    const item = { name: file.name, size: file.size, state: 'sending', part: 1 };
    this.items.push(item);
    this.changed();
    try {
      const picture = await readPicture(file);
      const others = this.pictures;
      const { count, characters } = this.actions.room();
      const used = others.reduce((sum, { url }) => sum + url.length, picture.url.length);
      if (others.length >= count || used > characters) throw new PictureError(t('picturesFull'));
      Object.assign(item, picture, { state: 'picture' });
      announce(t('announceFile', { name: item.name }));
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      Object.assign(item, { state: 'failed', error: error.message });
      announce(`${item.name}: ${item.error}`);
    }
    if (this.items.includes(item)) this.changed();
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
    const kept = [...this.ready, ...this.pictures];
    if (kept.length) remember(this.draft, JSON.stringify(kept), 'sessionStorage');
    else forget(this.draft);
    this.show();
    this.actions.changed();
  }

  show() {
    this.list.hidden = !this.items.length;
    this.list.replaceChildren(
      ...this.items.map((item, index) => {
        const remove = () => this.remove(item);
        return item.state === 'picture' ? thumbnail(item, { remove }) : chip(item, below(item, index), { remove, failed: item.state === 'failed' });
      }),
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
