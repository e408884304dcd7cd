// The <dialog>s of index.html. Each function resolves to the user's input, or to null if the dialog was cancelled.

import { byId, el } from './dom.js';
import { number, t } from './i18n.js';
import { FIELDS, readField } from './sampling.js';

/** Shows a dialog until it is submitted or closed; `read()` returns the input, or undefined if the form is not valid yet. */
function ask(dialog, read) {
  const form = dialog.querySelector('form');
  return new Promise((resolve) => {
    let answer = null;
    const listening = new AbortController();
    const on = (target, type, listener) => target.addEventListener(type, listener, { signal: listening.signal });
    on(form, 'submit', (event) => {
      event.preventDefault(); // never navigate
      answer = read(form);
      if (answer !== undefined) dialog.close();
    });
    for (const button of dialog.querySelectorAll('[data-close]')) on(button, 'click', () => dialog.close());
    on(dialog, 'click', (event) => event.target === dialog && dialog.close()); // the backdrop
    on(dialog, 'close', () => {
      listening.abort();
      resolve(answer ?? null);
    });
    dialog.showModal();
  });
}

export const showShortcuts = () => ask(byId('shortcuts-dialog'), () => true);

/** Shows a picture of a message in full. */
export function showPicture({ name, url, width, height }) {
  byId('picture-title').textContent = name;
  byId('picture-whole').replaceChildren(el('img', { src: url, alt: name, width, height }));
  return ask(byId('picture-dialog'), () => true);
}

export function askName(name) {
  const input = byId('rename-input');
  input.value = name;
  const answer = ask(byId('rename-dialog'), () => input.value.trim() || undefined);
  input.select();
  return answer;
}

export function confirmDelete(title) {
  byId('delete-text').textContent = t('deleteText', { title });
  return ask(byId('delete-dialog'), () => true);
}

/** {key, keep}; an empty key deletes the stored one. `refused`: the server rejected the last one. */
export function askKey({ refused, key, kept }) {
  const input = byId('key-input');
  input.value = key;
  byId('key-keep').checked = kept;
  byId('key-refused').hidden = !refused;
  const forget = byId('key-forget');
  forget.hidden = !key;
  forget.onclick = () => {
    input.value = '';
    byId('key-form').requestSubmit();
  };
  return ask(byId('key-dialog'), () => {
    const typed = input.value.trim();
    const sendable = /^[\x21-\x7e]*$/.test(typed); // the characters that a header can contain
    byId('key-refused').hidden = sendable;
    return sendable ? { key: typed, keep: byId('key-keep').checked } : undefined;
  });
}

/** {system, settings, asDefault} of a conversation. `model`: {context, sampling} as in api.js, or null. */
export function askSettings({ system, settings }, model) {
  const context = model?.context ?? null;
  const fields = FIELDS.map((field) => (field.name === 'max_tokens' && context ? { ...field, max: context } : field));
  byId('system-input').value = system;
  byId('settings-default').checked = false;
  byId('sampling').replaceChildren(...fields.map((field) => fieldNode(field, settings[field.name], model?.sampling?.[field.name])));
  return ask(byId('settings-dialog'), () => {
    const read = fields.map((field) => [field.name, check(field)]);
    const wrong = read.find(([, { error }]) => error);
    if (wrong) {
      byId(`field-${wrong[0]}`).focus();
      return undefined;
    }
    const values = Object.fromEntries(read.map(([name, { value }]) => [name, value]).filter(([, value]) => value !== undefined));
    return { system: byId('system-input').value, settings: values, asDefault: byId('settings-default').checked };
  });
}

function fieldNode(field, value, preset) {
  const { name, min, max, step } = field;
  const id = `field-${name}`;
  const input = el('input', {
    id,
    type: 'number',
    step: step ?? 1,
    min,
    max,
    inputmode: step ? 'decimal' : 'numeric',
    autocomplete: 'off',
    placeholder: presetText(name, preset),
    'aria-describedby': `${id}-hint ${id}-error`,
    onchange: () => check(field),
  });
  input.value = value ?? '';
  // A larger bound is of no use to the user.
  const range = max > 1e9 ? '' : ` (${t('range', { min: number(min, 2), max: number(max, 2) })})`;
  return el(
    'div.field',
    {},
    el('label', { for: id }, t(name)),
    input,
    el('p.hint', { id: `${id}-hint` }, `${t(`${name}Hint`)}${range}`),
    el('p.field-error', { id: `${id}-error`, 'aria-live': 'polite' }),
  );
}

/** The default for an empty field. */
function presetText(name, preset) {
  if (preset !== undefined) return t('presetIs', { value: number(preset, 3) });
  return t({ max_tokens: 'presetNoLimit', seed: 'presetRandom' }[name] ?? 'unset');
}

/** Reads a field and shows its error, if any. */
function check(field) {
  const input = byId(`field-${field.name}`);
  const result = readField(field, input.value, input.validity.badInput);
  input.setAttribute('aria-invalid', String(Boolean(result.error)));
  byId(`field-${field.name}-error`).textContent = result.error ? t(result.error, { min: number(field.min, 2), max: number(field.max, 2) }) : '';
  return result;
}
