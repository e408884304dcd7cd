// The message box, with one button: send, or stop while an answer is in progress.

import { byId } from './dom.js';
import { t } from './i18n.js';
import { forget, recall, remember } from './preferences.js';

const TOUCH = matchMedia('(hover: none) and (pointer: coarse)'); // no Shift key there: Enter starts a new line, the button sends

/** Whether a key press belongs to an input method that is still composing (Safari reports only the key code). */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

export class Composer {
  /** `actions`: {send(text, attached) -> whether it was accepted, stop(), editLast()}; `files`: the Attachments of the message. */
  constructor(actions, files) {
    Object.assign(this, { actions, files });
    this.area = byId('message');
    this.button = byId('send');
    this.busy = false;
    this.area.addEventListener('input', () => this.changed());
    this.area.addEventListener('keydown', (event) => this.onKey(event));
    this.button.addEventListener('click', () => (this.busy ? this.actions.stop() : this.send()));
    byId('composer').addEventListener('submit', (event) => event.preventDefault());
  }

  onKey(event) {
    if (isComposing(event)) return;
    if (event.key === 'Enter' && !event.shiftKey && !event.altKey && !TOUCH.matches) {
      event.preventDefault();
      if (!this.busy) this.send();
    } else if (event.key === 'ArrowUp' && this.area.value === '' && !this.busy) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    if (!this.sendable || !this.actions.send(this.area.value, { files: this.files.ready, pictures: this.files.pictures })) return;
    this.area.value = '';
    this.files.clear();
    this.changed();
    this.area.focus();
  }

  /** Switches to another conversation (null: a new one), and restores its draft, also after a reload. */
  open(id) {
    this.draft = `draft.${id ?? 'new'}`;
    this.files.open(this.draft);
    this.area.value = recall(this.draft, 'sessionStorage') ?? '';
    this.changed();
  }

  /** Puts a text into the box, to be sent or edited. */
  fill(text) {
    this.area.value = text;
    this.changed();
    this.area.focus();
  }

  changed() {
    if (this.area.value) remember(this.draft, this.area.value, 'sessionStorage');
    else forget(this.draft);
    this.area.style.setProperty('height', 'auto');
    this.area.style.setProperty('height', `${this.area.scrollHeight}px`);
    this.show();
  }

  get sendable() {
    return Boolean(this.area.value.trim() || this.files.pictures.length) && !this.files.sending;
  }

  setBusy(busy) {
    this.busy = busy;
    this.show();
  }

  show() {
    const label = t(this.busy ? 'stop' : 'send');
    this.button.setAttribute('aria-label', label);
    this.button.title = label;
    this.button.classList.toggle('stop', this.busy);
    this.button.disabled = !this.busy && !this.sendable;
    byId('keys-hint').hidden = TOUCH.matches;
  }
}
