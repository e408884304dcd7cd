// The page's controller: the open conversation, the answers in progress, and the actions of buttons and keys.

import { announce } from './announce.js';
import { Answer } from './answer.js';
import { ApiError, deleteFile, hasFile, listModels } from './api.js';
import * as branches from './branches.js';
import { Composer } from './composer.js';
import * as conversations from './conversation.js';
import * as dialogs from './dialogs.js';
import { byId, el } from './dom.js';
import { describeError } from './errors.js';
import { Attachments } from './files.js';
import { language, setLanguage, t, translate } from './i18n.js';
import { showMeter } from './meter.js';
import { paced } from './paced.js';
import * as preferences from './preferences.js';
import { cleanSettings } from './sampling.js';
import { listen } from './shortcuts.js';
import { Sidebar } from './sidebar.js';
import { keepUnfinished } from './store.js';
import { ThreadView } from './thread_view.js';
import * as transfer from './transfer.js';

const SAVE_MS = 400; // between saves of an answer in progress
const LONGEST_ANNOUNCED = 500;

/** A line above the message box; `quiet`: not an error. */
function notice(text, quiet = false) {
  byId('notice').textContent = text;
  byId('notice').classList.toggle('quiet', quiet);
}

export class App {
  /** `makeStream(root)`: see markdown_stream.js. */
  constructor(store, makeStream) {
    this.store = store;
    this.conversations = new Map();
    this.answers = new Map(); // conversation id -> its Answer in progress
    this.models = [];
    this.thread = new ThreadView({
      regenerate: (id) => this.regenerate(id),
      resend: (id, text) => this.resend(id, text),
      askKey: () => this.askKey(true),
      example: (text) => this.composer.fill(text),
      versionShown: (message) => branches.versionShown(this.current, message),
      showVersion: (id, step) => this.showVersion(id, step),
      makeStream,
    });
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id) => this.rename(id),
      exportJson: (id) => this.exportJson([this.conversations.get(id)]),
      exportMarkdown: (id) => this.exportMarkdown(id),
      remove: (id) => this.remove(id),
    });
    this.files = new Attachments({
      key: () => preferences.apiKey(),
      maxBytes: () => this.model?.maxFileBytes ?? null,
      sees: () => (this.model?.maxPictures ?? 0) > 0,
      room: () => conversations.roomForPictures(this.current, this.model),
      changed: () => this.composer.show(),
      refused: () => this.askKey(true),
    });
    this.composer = new Composer(
      { send: (text, attached) => this.send(text, attached), stop: () => this.stop(), editLast: () => this.thread.editLast() },
      this.files,
    );
    this.refresh = paced(() => this.showMeter());
    this.listen();
  }

  listen() {
    const click = (id, action) => byId(id).addEventListener('click', action);
    for (const id of ['new-chat', 'new-chat-top']) click(id, () => this.openNew());
    click('theme', () => this.nextTheme());
    click('language', () => this.nextLanguage());
    click('key', () => this.askKey(false));
    click('shortcuts', () => dialogs.showShortcuts());
    click('settings', () => this.askSettings());
    click('export-all', () => this.exportJson([...this.conversations.values()]));
    click('import', () => byId('import-input').click());
    byId('import-input').addEventListener('change', (event) => this.importFile(event.target));
    byId('model').addEventListener('change', (event) => this.pickModel(event.target.value));
    listen({
      stop: () => this.stop(),
      newChat: () => this.openNew(),
      sidebar: () => this.sidebar.toggle(),
      search: () => this.sidebar.focusSearch(),
      focus: () => this.composer.area.focus(),
      settings: () => this.askSettings(),
      shortcuts: () => dialogs.showShortcuts(),
      closeDrawer: () => this.sidebar.isDrawer && this.sidebar.opened && (this.sidebar.toggle(false), true),
    });
    window.addEventListener('popstate', () => this.openFromAddress());
    window.addEventListener('pagehide', () => this.leave());
    this.store.watch((event) => this.changedElsewhere(event));
  }

  async start() {
    for (const stored of await this.store.all()) this.conversations.set(stored.id, conversations.restored(stored));
    this.showTheme();
    this.openFromAddress();
    this.composer.area.focus();
    await this.loadModels();
  }

  // Models and the API key

  async loadModels() {
    try {
      this.models = await listModels(preferences.apiKey());
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) return this.askKey(preferences.apiKey() !== '');
      byId('model-error').textContent = describeError(error).title;
    }
    if (this.models.length) byId('model-error').textContent = '';
    this.showModels();
    if (!this.current.messages.length) this.showThread();
  }

  /** The conversation's model if the server has it, or else the server's first. */
  get model() {
    return this.models.find((model) => model.id === this.current.model) ?? this.models[0] ?? null;
  }

  pickModel(id) {
    this.current.model = id;
    this.showModels();
    this.saveIfKept();
  }

  async askKey(refused) {
    const kept = preferences.recall('key') !== null;
    const before = preferences.apiKey();
    const answer = await dialogs.askKey({ refused: refused && before !== '', key: before, kept });
    if (!answer) return;
    preferences.setApiKey(answer.key, answer.keep);
    await this.loadModels();
    const last = this.current.messages[this.current.messages.length - 1];
    if (answer.key && last?.error?.status === 401) this.regenerate(last.id);
  }

  // Sending messages

  /** Sends a message; returns whether it was accepted. */
  send(text, attached) {
    const { current } = this;
    if (this.busyElsewhere(current)) {
      announce(t('busyElsewhere'));
      notice(t('busyElsewhere'));
      return false;
    }
    if (this.answers.has(current.id)) return false;
    conversations.addUser(current, text, attached);
    if (!this.conversations.has(current.id)) {
      this.conversations.set(current.id, current);
      history.pushState(null, '', `#${current.id}`);
    }
    this.ask(current);
    return true;
  }

  regenerate(id) {
    const { current } = this;
    if (this.answers.has(current.id) || this.busyElsewhere(current)) return;
    const said = current.messages.some((message) => message.id === id && message.content);
    if (said) branches.setAside(current, id);
    else branches.remove(current, id); // an empty answer is not kept as a version
    this.ask(current);
    this.composer.area.focus();
  }

  resend(id, text) {
    const { current } = this;
    this.stop();
    const { files, pictures } = current.messages.find((message) => message.id === id) ?? {};
    branches.setAside(current, id);
    conversations.addUser(current, text, { files, pictures });
    this.ask(current);
    this.composer.area.focus();
  }

  /** Shows another version of a message, and what followed it. */
  showVersion(id, step) {
    const { current } = this;
    const index = current.messages.findIndex((message) => message.id === id);
    if (this.answers.has(current.id) || this.busyElsewhere(current) || !branches.showVersion(current, id, step)) return;
    this.save(current);
    this.showThread('sync');
    this.thread.focusVersions(index);
  }

  async ask(conversation) {
    const model = this.model?.id ?? conversation.model ?? '';
    const body = conversations.requestBody(conversation, model);
    const message = conversations.addAnswer(conversation);
    const answer = new Answer(message, body, preferences.apiKey(), () => this.progressed(conversation));
    this.answers.set(conversation.id, answer);
    notice('');
    this.save(conversation);
    this.showSidebar();
    this.showThread('sync');
    announce(t('announceStart'));
    const ticking = setInterval(() => this.isOpen(conversation) && this.thread.refresh(), 500); // updates the time of reasoning
    await answer.run();
    clearInterval(ticking);
    if (this.answers.get(conversation.id) === answer) this.answers.delete(conversation.id);
    if (message.state === 'done' && this.model?.maxPictures === null) this.loadModels(); // it is loaded now
    if (message.error?.code === 'file_not_found') await this.lookForFiles(conversation);
    if (message.state === 'interrupted' || !conversation.messages.includes(message)) return;
    conversation.updated = Date.now();
    this.save(conversation);
    this.showSidebar();
    this.sayResult(message);
    if (this.isOpen(conversation)) this.showEnd(message);
  }

  /** Marks files that the server no longer has, so that the next attempt omits them. */
  async lookForFiles(conversation) {
    const key = preferences.apiKey();
    await Promise.all(conversations.filesOf(conversation).map(async (file) => (file.gone = !(await hasFile(file.id, key)))));
    if (this.isOpen(conversation)) this.showThread();
  }

  progressed(conversation) {
    this.saveSoon(conversation);
    if (!this.isOpen(conversation)) return;
    this.thread.refresh();
    this.refresh();
  }

  showEnd(message) {
    this.thread.update();
    this.showMeter();
    if (message.error?.status === 401) this.askKey(true);
  }

  sayResult(message) {
    if (message.state === 'stopped') announce(t('announceStopped'));
    else if (message.state === 'error') announce(t('announceError', { text: describeError(message.error).title }));
    else announce(t('announceDone', { text: message.content.slice(0, LONGEST_ANNOUNCED) }));
  }

  /** Stops the answer; returns whether there was one. */
  stop() {
    const answer = this.answers.get(this.current.id);
    answer?.stop();
    return Boolean(answer);
  }

  // Conversations

  isOpen(conversation) {
    return this.current === conversation;
  }

  openNew() {
    history.pushState(null, '', location.pathname + location.search);
    this.openFromAddress();
    this.closeDrawer();
    this.composer.area.focus();
  }

  open(id) {
    if (id !== this.current.id) history.pushState(null, '', `#${id}`);
    this.openFromAddress();
    this.closeDrawer();
    this.composer.area.focus();
  }

  openFromAddress() {
    const kept = this.conversations.get(location.hash.slice(1));
    this.current = kept ?? conversations.newConversation(this.defaults());
    notice('');
    this.composer.open(kept ? kept.id : null);
    this.showSidebar();
    this.showThread('show');
    this.showModels();
  }

  closeDrawer() {
    if (this.sidebar.isDrawer && this.sidebar.opened) this.sidebar.set(false);
  }

  async rename(id) {
    const conversation = this.conversations.get(id);
    const name = await dialogs.askName(conversation.title);
    if (name === null) return;
    Object.assign(conversation, { title: name, named: true });
    this.save(conversation);
    this.showSidebar();
    this.showTitle();
  }

  exportJson(chosen) {
    const name = chosen.length === 1 ? chosen[0].title : 'conversations';
    transfer.download(transfer.fileName(name, 'json'), 'application/json', transfer.toJson(chosen));
  }

  exportMarkdown(id) {
    const conversation = this.conversations.get(id);
    transfer.download(transfer.fileName(conversation.title, 'md'), 'text/markdown', transfer.toMarkdown(conversation));
  }

  async importFile(input) {
    const [file] = input.files;
    const imported = file && (await transfer.fromFile(file));
    input.value = ''; // allows choosing the same file again
    if (!file) return;
    const said = imported ? t('imported', { n: imported.length }) : t('notImported', { name: file.name });
    for (const conversation of imported ?? []) {
      this.conversations.set(conversation.id, conversation);
      this.save(conversation);
    }
    if (imported?.length) this.open(imported[0].id);
    notice(said, imported !== null);
    announce(said);
  }

  async remove(id) {
    const conversation = this.conversations.get(id);
    if (!(await dialogs.confirmDelete(conversation.title || t('untitled')))) return;
    this.answers.get(id)?.interrupt();
    this.answers.delete(id);
    this.conversations.delete(id);
    const files = conversations.filesOf(conversation).filter(({ gone }) => !gone); // versions of a message share their files
    for (const file of new Set(files.map((known) => known.id))) deleteFile(file, preferences.apiKey());
    await this.store.delete(id);
    if (this.isOpen(conversation)) this.openNew();
    else this.showSidebar();
  }

  async askSettings() {
    const { current } = this;
    const answer = await dialogs.askSettings(current, this.model);
    if (!answer) return;
    const { asDefault, ...chosen } = answer;
    Object.assign(current, chosen);
    if (asDefault) preferences.remember('defaults', JSON.stringify(chosen));
    this.saveIfKept();
  }

  /** The user's defaults for new conversations. */
  defaults() {
    try {
      const { system = '', settings } = JSON.parse(preferences.recall('defaults') ?? '{}');
      return { system: String(system), settings: cleanSettings(settings) };
    } catch {
      return {};
    }
  }

  // Storage

  async save(conversation) {
    if (!this.conversations.has(conversation.id)) return;
    try {
      await this.store.put(conversation);
    } catch {
      this.store.lasting = false; // for example, the disk is full
      notice(t('notKept'));
    }
  }

  saveIfKept() {
    if (this.conversations.has(this.current.id)) this.save(this.current);
  }

  saveSoon(conversation) {
    this.saving ??= new Set();
    if (this.saving.has(conversation.id)) return;
    this.saving.add(conversation.id);
    setTimeout(() => {
      this.saving.delete(conversation.id);
      if (this.answers.has(conversation.id)) this.save(conversation);
    }, SAVE_MS);
  }

  leave() {
    const unfinished = [];
    for (const [id, answer] of this.answers) {
      answer.interrupt();
      unfinished.push({ id, message: answer.message });
      this.save(this.conversations.get(id));
    }
    keepUnfinished(unfinished);
  }

  // Other tabs

  /** Whether another tab is receiving the conversation's last answer; two would overwrite each other. */
  busyElsewhere(conversation) {
    const last = conversation.messages[conversation.messages.length - 1];
    return last?.state === 'streaming' && !this.answers.has(conversation.id);
  }

  async changedElsewhere({ changed, deleted }) {
    const id = changed ?? deleted;
    if (this.answers.has(id)) return; // this tab is receiving it and has the newer state
    const stored = changed && (await this.store.get(changed));
    if (stored) this.conversations.set(id, conversations.restored(stored, true));
    else this.conversations.delete(id);
    if (this.current.id !== id) return this.showSidebar();
    if (!stored) return this.openNew();
    this.current = this.conversations.get(id);
    this.showSidebar();
    this.showThread('show');
  }

  // Display

  showThread(how = 'show') {
    const answer = this.answers.get(this.current.id) ?? null;
    this.thread[how](this.current, answer, { model: this.model?.id, lasting: this.store.lasting });
    this.composer.setBusy(answer !== null);
    this.showTitle();
    this.showMeter();
  }

  showTitle() {
    byId('title').textContent = this.current.title || t('untitled');
  }

  showSidebar() {
    this.sidebar.show(this.conversations.values(), this.current.id, (id) => this.answers.has(id));
    this.composer.setBusy(this.answers.has(this.current.id));
  }

  showMeter() {
    showMeter(this.current, this.model?.context ?? null, this.answers.get(this.current.id) ?? null);
  }

  showModels() {
    const select = byId('model');
    const options = this.models.map(({ id }) => el('option', { value: id, selected: id === this.model.id }, id));
    select.replaceChildren(...(options.length ? options : [el('option', { value: '' }, t('noModels'))]));
    select.disabled = this.models.length < 2;
    this.files.showKinds();
    this.showMeter();
  }

  nextTheme() {
    preferences.nextTheme();
    this.showTheme();
  }

  showTheme() {
    const theme = preferences.theme();
    const name = `theme${theme[0].toUpperCase()}${theme.slice(1)}`;
    const button = byId('theme');
    button.setAttribute('aria-label', t(name));
    button.title = t(name);
    button.querySelector('use').setAttribute('href', `#icon-${theme}`);
  }

  nextLanguage() {
    setLanguage(language() === 'zh' ? 'en' : 'zh');
    translate();
    this.showTheme();
    this.showSidebar();
    this.showThread('show');
    this.showModels();
    this.composer.show();
    this.files.show();
  }
}
