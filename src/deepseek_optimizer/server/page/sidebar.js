// The list of conversations: a column next to the chat or, on small screens, a drawer over it.

import { byId, el, iconButton } from './dom.js';
import { t } from './i18n.js';
import { openMenu } from './menus.js';
import { paced } from './paced.js';
import { recall, remember } from './preferences.js';
import { search } from './search.js';

const NARROW = matchMedia('(max-width: 51.99em)');

export class Sidebar {
  /** `actions`: {open(id), rename(id), exportJson(id), exportMarkdown(id), remove(id)}. */
  constructor(actions) {
    this.actions = actions;
    this.root = byId('sidebar');
    this.list = byId('conversations');
    this.menu = byId('conversation-menu');
    this.opened = !NARROW.matches && recall('sidebar') !== 'closed';
    byId('open-sidebar').addEventListener('click', () => this.toggle(true));
    byId('close-sidebar').addEventListener('click', () => this.toggle(false));
    byId('scrim').addEventListener('click', () => this.toggle(false));
    NARROW.addEventListener('change', () => this.set(!NARROW.matches && recall('sidebar') !== 'closed'));
    for (const [id, name] of [['menu-rename', 'rename'], ['menu-markdown', 'exportMarkdown'], ['menu-json', 'exportJson'], ['menu-delete', 'remove']]) {
      byId(id).addEventListener('click', () => {
        this.menu.hidePopover();
        this.actions[name](this.menuFor);
      });
    }
    this.search = byId('search');
    this.search.addEventListener('input', paced(() => this.draw()));
    this.search.addEventListener('keydown', (event) => this.onSearchKey(event));
    this.set(this.opened);
  }

  get isDrawer() {
    return NARROW.matches;
  }

  /** Opens or closes it for the user, and moves the focus accordingly. */
  toggle(open = !this.opened) {
    if (!this.isDrawer) remember('sidebar', open ? 'open' : 'closed');
    this.set(open);
    byId(open ? 'close-sidebar' : 'open-sidebar').focus();
  }

  focusSearch() {
    this.set(true);
    this.search.select();
    this.search.focus();
  }

  onSearchKey(event) {
    if (event.key === 'Escape' && this.search.value) {
      event.stopPropagation(); // only clear the search, without stopping an answer
      this.search.value = '';
      this.draw();
    } else if (event.key === 'ArrowDown') {
      event.preventDefault();
      this.list.querySelector('button')?.focus();
    }
  }

  set(open) {
    this.opened = open;
    this.root.hidden = !open;
    for (const id of ['open-sidebar', 'new-chat-top']) byId(id).hidden = open && !this.isDrawer;
    byId('open-sidebar').setAttribute('aria-expanded', String(open));
    byId('scrim').hidden = !(open && this.isDrawer);
    byId('main').inert = open && this.isDrawer; // under the drawer, so not reachable with Tab
  }

  /** Shows the conversations that match the search, newest first. `busy(id)`: whether one is being answered. */
  show(conversations, currentId, busy) {
    this.shown = { conversations: [...conversations], currentId, busy };
    this.draw();
  }

  draw() {
    const { conversations, currentId, busy } = this.shown;
    const found = search(conversations, this.search.value).sort((a, b) => b.conversation.updated - a.conversation.updated);
    const items = found.map(({ conversation: { id, title }, excerpt }) => this.item({ id, title, excerpt, current: id === currentId, busy: busy(id) }));
    const none = el('li.none', { role: 'status' }, t(conversations.length ? 'nothingFound' : 'noConversations'));
    this.list.replaceChildren(...(items.length ? items : [none]));
    byId('export-all').disabled = !conversations.length;
  }

  item({ id, title, excerpt, current, busy }) {
    const name = title || t('untitled');
    const [before, match, after] = excerpt ?? [];
    const open = el(
      'button.conversation',
      { type: 'button', title: name, 'aria-current': current && 'page', onclick: () => this.actions.open(id) },
      el(
        'span.conversation-text',
        {},
        el('bdi.conversation-title', {}, name),
        excerpt && el('bdi.conversation-excerpt', {}, before, el('mark', {}, match), after),
      ),
      busy && el('span.busy', { role: 'img', 'aria-label': t('answering') }),
    );
    const more = iconButton('more', t('conversationMenu', { title: name }), () => this.openMenu(id, more));
    more.setAttribute('aria-haspopup', 'dialog');
    return el(current ? 'li.current' : 'li', {}, open, more);
  }

  openMenu(id, button) {
    this.menuFor = id;
    openMenu(this.menu, button, 'right');
  }
}
