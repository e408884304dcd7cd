// One message on the page. update() shows the current state of the message, and changes only what is different.

import { copyText } from './clipboard.js';
import { citationsNode } from './citations.js';
import { el, icon, iconButton } from './dom.js';
import { describeError } from './errors.js';
import { chip, factsOf } from './files.js';
import { number, seconds, t } from './i18n.js';
import { thumbnail } from './pictures.js';

/** A text button below the message: copy, answer again, edit. */
function action(name, label, text, onclick) {
  const words = el('span', {}, text);
  return el('button.action', { type: 'button', 'aria-label': label, title: label, onclick: () => onclick(words) }, icon(name), words);
}

/** "< 1/2 >" if a message has several versions; null otherwise. */
function versionsNode(message, { versionShown, showVersion }) {
  const { number: shown, count } = versionShown(message);
  if (count < 2) return null;
  const button = (name, label, step, possible) => {
    const node = iconButton(name, t(label), () => showVersion(message.id, step));
    node.disabled = !possible;
    return node;
  };
  return el(
    'span.versions',
    { role: 'group', 'aria-label': t('versionOf', { n: shown, all: count }) },
    button('back', 'versionBefore', -1, shown > 1),
    el('span', { 'aria-hidden': 'true' }, `${shown}/${count}`),
    button('chevron', 'versionAfter', 1, shown < count),
  );
}

export class UserMessageView {
  /** `actions`: {resend(id, text), versionShown(message), showVersion(id, step)}. */
  constructor(message, actions) {
    Object.assign(this, { message, actions });
    this.element = el('article.message.user', { 'aria-label': t('you') });
    this.show();
  }

  update() {}

  show() {
    const { content } = this.message;
    const buttons = el(
      'div.actions',
      {},
      versionsNode(this.message, this.actions),
      action('copy', t('copyMessage'), t('copy'), (label) => copyText(content, label)),
      this.editButton = action('edit', t('edit'), t('edit'), () => this.edit()),
    );
    const { files = [], pictures = [] } = this.message;
    const chips = files.length > 0 && el('ul.chips', { 'aria-label': t('files') }, ...files.map((file) => chip(file, factsOf(file))));
    const thumbnails = pictures.length > 0 && el('ul.pictures', { 'aria-label': t('pictures') }, ...pictures.map((one) => thumbnail(one)));
    const bubble = content.trim() && el('div.bubble', { dir: 'auto' }, content);
    this.element.replaceChildren(...[chips, thumbnails, bubble, buttons].filter(Boolean));
  }

  /** Replaces the message by a box for editing it. */
  edit() {
    const area = el('textarea', { 'aria-label': t('editMessage'), rows: 3, dir: 'auto' });
    area.value = this.message.content;
    const close = () => {
      this.show();
      this.editButton.focus();
    };
    const send = () => (area.value.trim() || this.message.pictures?.length) && this.actions.resend(this.message.id, area.value);
    area.addEventListener('keydown', (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === 'Enter' && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === 'Escape') {
        event.stopPropagation(); // close only this box, without stopping an answer
        close();
      }
    });
    const buttons = el(
      'div.edit-buttons',
      {},
      el('span.hint', {}, t('editHint')),
      el('button.button', { type: 'button', onclick: close }, t('cancel')),
      el('button.button.primary', { type: 'button', onclick: send }, t('resend')),
    );
    this.element.replaceChildren(el('div.editor', {}, area, buttons));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

export class AnswerView {
  /** `actions`: those of UserMessageView, makeStream(root), regenerate(id), askKey(); `answer`: its Answer if it is in progress. */
  constructor(message, actions, answer) {
    Object.assign(this, { message, actions, answer });
    this.shown = { reasoning: 0, content: 0 };
    this.thoughts = el('div.markdown.quiet');
    this.summary = el('span');
    this.thinking = el('details.thinking', { hidden: true }, el('summary', {}, icon('chevron'), this.summary), this.thoughts);
    this.body = el('div.markdown');
    this.wait = el('p.waiting', { role: 'img', 'aria-label': t('waiting') }, el('span'), el('span'), el('span'));
    this.reading = el('p.hint.reading', { hidden: true });
    this.notes = el('div.notes');
    this.foot = el('div.actions');
    this.element = el('article.message.assistant', { 'aria-label': t('assistant') });
    this.element.append(this.thinking, this.body, this.wait, this.reading, this.notes, this.foot);
    this.streams = { reasoning: actions.makeStream(this.thoughts), content: actions.makeStream(this.body) };
    this.state = null;
    this.update();
  }

  /** Shows what has arrived. `last`: nothing follows this answer, so it can be regenerated. */
  update(last = this.last) {
    const { message } = this;
    const open = message.state === 'streaming';
    this.pull('reasoning', open && !message.content);
    this.pull('content', open);
    this.thinking.hidden = !message.reasoning;
    if (message.reasoning) this.summary.textContent = this.thinkingText();
    this.wait.hidden = !open || Boolean(message.reasoning || message.content);
    const read = this.answer?.readPart ?? null;
    this.reading.hidden = this.wait.hidden || read === null;
    if (read !== null) this.reading.textContent = t('readingPart', { percent: number(Math.floor(100 * read)) });
    if (message.state === this.state && last === this.last) return;
    this.state = message.state;
    this.last = last;
    this.element.setAttribute('aria-busy', String(open));
    this.notes.replaceChildren(...(open ? [] : this.noteNodes()));
    this.foot.replaceChildren(...(open ? [] : this.footNodes()));
  }

  pull(name, open) {
    const text = this.message[name] ?? '';
    if (text.length > this.shown[name]) this.streams[name].append(text.slice(this.shown[name]));
    this.shown[name] = text.length;
    this.streams[name].render(open);
  }

  thinkingText() {
    const { thinkingMs, content, state } = this.message;
    if (thinkingMs !== null && thinkingMs !== undefined) return t('thought', { time: seconds(thinkingMs) });
    if (state !== 'streaming' || content) return t('thoughts');
    return this.answer ? t('thinkingFor', { time: seconds(this.answer.thinkingMs) }) : t('thinking');
  }

  noteNodes() {
    const { state, finish, stats, content, reasoning, error, citations, document } = this.message;
    const notes = [];
    if (stats?.droppedTokens > 0) notes.push(t('noteDropped', { n: number(stats.droppedTokens) }));
    if (state === 'stopped') notes.push(t('noteStopped'));
    if (state === 'interrupted') notes.push(t('noteInterrupted'));
    if (state === 'done' && finish === 'length') notes.push(t('noteLength'));
    if (state === 'done' && !content && !reasoning) notes.push(t('noteEmpty'));
    const nodes = notes.map((text) => el('p.note', {}, text));
    if (state === 'error') nodes.push(this.errorNode(error));
    const cited = citationsNode(citations, document);
    return cited ? [cited, ...nodes] : nodes;
  }

  errorNode(error) {
    const { title, detail } = describeError(error);
    const keys = error.status === 401 && el('button.button', { type: 'button', onclick: () => this.actions.askKey() }, t('enterKey'));
    return el(
      'div.error',
      {},
      icon('alert'),
      el('div.error-text', {}, el('p', {}, el('strong', {}, title)), detail && el('p.error-detail', { dir: 'auto' }, detail)),
      keys,
      this.last && el('button.button', { type: 'button', onclick: () => this.actions.regenerate(this.message.id) }, t('retry')),
    );
  }

  footNodes() {
    const { content, state } = this.message;
    return [
      versionsNode(this.message, this.actions),
      content && action('copy', t('copyMessage'), t('copy'), (label) => copyText(content, label)),
      this.last && state !== 'error' && action('again', t('regenerate'), t('regenerate'), () => this.actions.regenerate(this.message.id)),
      el('span.stats', {}, ...statsText(this.message.stats)),
    ].filter(Boolean);
  }
}

/** "128 tokens · 34.2 tokens/s · first token after 0.12 s", as far as these are known. */
export function statsText(stats) {
  if (!stats?.tokens) return [];
  const about = (text) => (stats.exact ? text : t('aboutPrefix', { text }));
  const parts = [about(t(stats.tokens === 1 ? 'oneToken' : 'tokens', { n: number(stats.tokens) }))];
  if (stats.tokensPerSecond) parts.push(about(t('speed', { n: number(stats.tokensPerSecond, 1) })));
  if (stats.firstTokenMs !== undefined) parts.push(t('firstToken', { time: seconds(stats.firstTokenMs) }));
  return [parts.join(' · ')];
}

export const makeView = (message, actions, answer) =>
  message.role === 'user' ? new UserMessageView(message, actions) : new AnswerView(message, actions, answer);

