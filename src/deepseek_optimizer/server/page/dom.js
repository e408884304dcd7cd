// The only place where elements are created. Text always becomes text nodes: output of a model or server is never parsed as HTML.

const SVG = 'http://www.w3.org/2000/svg';

/**
 * An element. `tag` may carry classes ("div.note.quiet"); `props` are attributes, or listeners where the name starts with "on"
 * and the value is a function; undefined, null and false are omitted. Strings among the children become text nodes.
 */
export function el(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split('.');
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(' ');
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? '' : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An icon from the sprite in index.html. It is hidden from screen readers, so the control that contains it needs a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const use = document.createElementNS(SVG, 'use');
  use.setAttribute('href', `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; `label` is its accessible name. */
export function iconButton(name, label, onclick, classes = '') {
  return el(`button.icon-button${classes}`, { type: 'button', 'aria-label': label, title: label, onclick }, icon(name));
}

export const byId = (id) => document.getElementById(id);
