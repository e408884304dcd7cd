// The messages of the open conversation.

import { byId, el } from './dom.js';
import { Follower } from './follow.js';
import { t } from './i18n.js';
import { makeView } from './message_view.js';
import { paced } from './paced.js';

const EXAMPLES = ['exampleExplain', 'exampleCode', 'exampleMath', 'exampleWrite'];

export class ThreadView {
  /** `actions`: example(text), and those of message_view.js. */
  constructor(actions) {
    this.actions = actions;
    this.root = byId('thread');
    this.follower = new Follower(byId('scroller'), byId('to-end'));
    this.views = [];
    this.refresh = paced(() => this.update());
  }

  /** Shows a conversation from scratch; `answer`: the one in progress, if any; `welcome`: text of an empty conversation. */
  show(conversation, answer, welcome) {
    this.views = conversation.messages.map((message) => makeView(message, this.actions, answer?.message === message ? answer : null));
    this.root.replaceChildren(...(this.views.length ? this.views.map((view) => view.element) : [this.welcomeNode(welcome)]));
    this.update();
    this.follower.toEnd();
  }

  /** Updates the view after messages were removed or added at the end; others are not changed. */
  sync(conversation, answer) {
    const { messages } = conversation;
    let same = 0;
    while (same < messages.length && this.views[same]?.message === messages[same]) same += 1;
    for (const view of this.views.splice(same)) view.element.remove();
    if (same === 0) this.root.replaceChildren();
    for (const message of messages.slice(same)) {
      const view = makeView(message, this.actions, answer?.message === message ? answer : null);
      this.views.push(view);
      this.root.append(view.element);
    }
    this.update();
    this.follower.toEnd();
  }

  update() {
    const last = this.views.length - 1;
    // Only the end changes: the last message, and the one before it, which is no longer the last.
    for (const [index, view] of this.views.entries()) if (index >= last - 2) view.update(index === last);
    this.follower.keepUp();
  }

  /** Keeps the focus in the message whose version was changed: on its other button if there is no further version. */
  focusVersions(index) {
    const { element } = this.views[index];
    element.querySelector('.versions button:not(:disabled)')?.focus({ preventScroll: true });
    element.scrollIntoView({ block: 'nearest' });
  }

  editLast() {
    const view = this.views.findLast((one) => one.message.role === 'user');
    view?.edit();
  }

  welcomeNode({ model, lasting }) {
    const examples = EXAMPLES.map((key) => el('button.example', { type: 'button', onclick: () => this.actions.example(t(key)) }, t(key)));
    return el(
      'div.welcome',
      {},
      el('h2', {}, t('welcome')),
      el('p', {}, t(lasting ? 'welcomeText' : 'notKept')),
      model && el('p.welcome-model', { translate: 'no' }, model),
      el('div.examples', { role: 'group', 'aria-label': t('examples') }, ...examples),
    );
  }
}
