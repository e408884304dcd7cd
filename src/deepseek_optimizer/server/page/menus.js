// Menus: popovers that open beside a button.

/** Opens a menu below a button, or above it if there is no room; `align`: the side on which both are aligned. */
export function openMenu(menu, button, align) {
  const { left, right, bottom, top } = button.getBoundingClientRect();
  menu.showPopover({ source: button });
  const { offsetWidth, offsetHeight } = menu;
  const below = bottom + offsetHeight < window.innerHeight;
  const wanted = align === 'left' ? Math.min(left, window.innerWidth - offsetWidth - 8) : right - offsetWidth;
  menu.style.setProperty('left', `${Math.max(8, wanted)}px`);
  menu.style.setProperty('top', `${below ? bottom : Math.max(8, top - offsetHeight)}px`);
  [...menu.querySelectorAll('button')].find((item) => item.checkVisibility()).focus();
}
