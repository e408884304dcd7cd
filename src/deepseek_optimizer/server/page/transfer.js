// Export of conversations as JSON, which can be imported again, and as Markdown, for reading.

import { newId, restored } from './conversation.js';
import { el } from './dom.js';
import { language, t } from './i18n.js';

const FORMAT = 'deepseek-optimizer-chat';
const LARGEST = 100e6; // bytes of a file that is imported

/** JSON with everything in the conversations: every version of every message, and the settings. */
export const toJson = (conversations) => JSON.stringify({ format: FORMAT, version: 2, conversations }, null, 2);

/** The visible messages, without reasoning. */
export function toMarkdown({ title, system, model, created, messages }) {
  const facts = [model, new Date(created).toLocaleString(document.documentElement.lang)].filter(Boolean).join(' · ');
  const parts = [`# ${title || t('untitled')}`, `_${facts}_`];
  if (system.trim()) parts.push(`## ${t('system')}`, system.trim());
  for (const { role, content, files = [], pictures = [], citations = [] } of messages) {
    parts.push(`## ${t(role === 'user' ? 'you' : 'assistant')}`);
    const attached = [...files, ...pictures];
    if (attached.length) parts.push(attached.map(({ name }) => `- ${name}`).join('\n'));
    if (content.trim()) parts.push(content.trim());
    if (citations.length) parts.push(`${t('citations')}${language() === 'zh' ? '：' : ':'}`, citations.map(citationLine).join('\n'));
  }
  return `${parts.join('\n\n')}\n`;
}

const citationLine = ({ name, text, page, line }, index) => {
  const place = page !== null ? t('page', { n: page }) : line !== null ? t('line', { n: line }) : '';
  return `${index + 1}. ${[name, place].filter(Boolean).join(', ')}: ${text.replace(/\s+/g, ' ')}`;
};

/** A file name that is valid on every system. */
export function fileName(title, ending) {
  const safe = title.replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '').slice(0, 40);
  return `${safe || 'chat'}.${ending}`;
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/**
 * The conversations in a file written by `toJson` of this or an earlier version; null for another file. They get new ids, so that
 * none replaces an existing one, and their documents count as gone, since they belong to another server or user.
 */
export async function fromFile(file) {
  if (file.size > LARGEST) return null;
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    return null;
  }
  const stored = data?.format === FORMAT && (data.conversations ?? [data.conversation]);
  if (!Array.isArray(stored) || !stored.every((one) => Array.isArray(one?.messages))) return null;
  return stored.map((one) => {
    const conversation = { ...restored(one), id: newId() };
    for (const messages of [conversation.messages, ...conversation.others.map((tail) => tail.messages)]) {
      for (const message of messages) if (message.files) message.files = message.files.map((known) => ({ ...known, gone: true }));
    }
    return conversation;
  });
}
