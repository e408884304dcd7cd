// The list of conversations: a column beside the chat, on small screens a drawer over it.

import { byId, el, iconButton } from './dom.js';
import { t } from './i18n.js';
import { recall, remember } from './preferences.js';

const NARROW = matchMedia('(max-width: 51.99em)');

export class Sidebar {
  /** `actions`: {open(id), rename(id), exportOne(id), remove(id)}. */
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
    for (const [id, name] of [['menu-rename', 'rename'], ['menu-export', 'exportOne'], ['menu-delete', 'remove']]) {
      byId(id).addEventListener('click', () => {
        this.menu.hidePopover();
        this.actions[name](this.menuFor);
      });
    }
    this.set(this.opened);
  }

  get isDrawer() {
    return NARROW.matches;
  }

  /** Opens or closes it for the reader: the focus goes along. */
  toggle(open = !this.opened) {
    if (!this.isDrawer) remember('sidebar', open ? 'open' : 'closed');
    this.set(open);
    byId(open ? 'close-sidebar' : 'open-sidebar').focus();
  }

  set(open) {
    this.opened = open;
    this.root.hidden = !open;
    byId('open-sidebar').hidden = open && !this.isDrawer;
    byId('open-sidebar').setAttribute('aria-expanded', String(open));
    byId('scrim').hidden = !(open && this.isDrawer);
    byId('main').inert = open && this.isDrawer; // under the drawer: not to be reached by Tab
  }

  /** Draws the list, newest first. `busy(id)`: whether an answer is on its way there. */
  show(conversations, currentId, busy) {
    const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
    const items = sorted.map((conversation) => this.item(conversation, conversation.id === currentId, busy(conversation.id)));
    this.list.replaceChildren(...(items.length ? items : [el('li.none', {}, t('noConversations'))]));
  }

  item({ id, title }, current, busy) {
    const name = title || t('untitled');
    const open = el(
      'button.conversation',
      { type: 'button', title: name, 'aria-current': current && 'page', onclick: () => this.actions.open(id) },
      el('bdi.conversation-title', {}, name),
      busy && el('span.busy', { role: 'img', 'aria-label': t('answering') }),
    );
    const more = iconButton('more', t('conversationMenu', { title: name }), () => this.openMenu(id, more));
    more.setAttribute('aria-haspopup', 'dialog');
    return el(current ? 'li.current' : 'li', {}, open, more);
  }

  openMenu(id, button) {
    this.menuFor = id;
    const { right, bottom, top } = button.getBoundingClientRect();
    this.menu.showPopover({ source: button });
    const { offsetWidth, offsetHeight } = this.menu;
    const below = bottom + offsetHeight < window.innerHeight;
    this.menu.style.setProperty('left', `${Math.max(8, right - offsetWidth)}px`);
    this.menu.style.setProperty('top', `${below ? bottom : Math.max(8, top - offsetHeight)}px`);
    byId('menu-rename').focus();
  }
}
