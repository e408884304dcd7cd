// A conversation as plain data, as it is stored, sent and exported.
//
// {id, title, named, created, updated, model, system, settings, messages, others}, where `others` are the hidden branches (see
// branches.js). A message is {id, role, content}, with {version} if there are several, {files} if the user attached some (see
// files.js) and, if a model wrote it, {reasoning, thinkingMs, state, error, finish, stats, citations, document}.
// `state`: 'streaming', 'done', 'stopped', 'interrupted' or 'error'.

import { append } from './branches.js';
import { cleanSettings } from './sampling.js';

const LONGEST_TITLE = 60;

/** A random id; unlike crypto.randomUUID, it is also available over plain HTTP. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

export function newConversation({ model = null, system = '', settings = {} } = {}) {
  const now = Date.now();
  return { id: newId(), title: '', named: false, created: now, updated: now, model, system, settings, messages: [], others: [] };
}

export function addUser(conversation, content, files = []) {
  append(conversation, { id: newId(), role: 'user', content, ...(files.length ? { files } : {}) });
  conversation.updated = Date.now();
  if (!conversation.named && conversation.messages.length === 1) conversation.title = titleOf(content);
}

export function addAnswer(conversation) {
  const message = { id: newId(), role: 'assistant', content: '', reasoning: '', thinkingMs: null, state: 'streaming', stats: {} };
  append(conversation, message);
  return message;
}

function titleOf(text) {
  const characters = [...text.trim().replace(/\s+/g, ' ')]; // code points, so that no emoji is split
  return characters.length > LONGEST_TITLE ? `${characters.slice(0, LONGEST_TITLE).join('')}…` : characters.join('');
}

/**
 * The body of the request for the next answer. Reasoning is omitted, since models are not trained on their earlier reasoning.
 * Answers that failed before their first token are omitted too, and the user messages around them joined, since many chat
 * templates refuse two in a row.
 */
export function requestBody(conversation, model) {
  const messages = conversation.system.trim() ? [{ role: 'system', content: conversation.system }] : [];
  const files = new Map(); // message -> its files
  for (const { role, content, files: attached = [] } of conversation.messages) {
    const last = messages[messages.length - 1];
    if (role === 'assistant' && !content) continue;
    if (last?.role === role) last.content += `\n\n${content}`;
    else messages.push({ role, content });
    const message = messages[messages.length - 1];
    files.set(message, [...(files.get(message) ?? []), ...attached.filter(({ gone }) => !gone)]);
  }
  for (const [message, attached] of files) if (attached.length) message.content = parts(attached, message.content);
  return { model, messages, stream: true, stream_options: { include_usage: true }, ...conversation.settings };
}

const parts = (files, text) => [...files.map(({ id }) => ({ type: 'file', file: { file_id: id } })), { type: 'text', text }];

/** All messages of a conversation, including those of hidden branches. */
const allMessages = ({ messages, others }) => [...messages, ...others.flatMap((tail) => tail.messages)];

/** All files of a conversation's messages. */
export const filesOf = (conversation) => allMessages(conversation).flatMap(({ files = [] }) => files);

/**
 * Completes a stored conversation, in which fields may be missing if another version of the page stored it. An answer that was
 * in progress when the page was closed is marked as interrupted, unless `live` (another tab is receiving it).
 */
export function restored(stored, live = false) {
  const conversation = { ...newConversation(), ...stored, messages: restoredMessages(stored.messages), others: [] };
  for (const tail of Array.isArray(stored.others) ? stored.others : []) {
    const messages = restoredMessages(tail?.messages);
    if (messages.length) conversation.others.push({ parent: tail.parent ?? null, messages });
  }
  conversation.title = String(stored.title ?? '');
  conversation.system = String(stored.system ?? '');
  conversation.settings = cleanSettings(stored.settings);
  if (!live) for (const message of allMessages(conversation)) if (message.state === 'streaming') message.state = 'interrupted';
  return conversation;
}

const restoredMessages = (stored) => (Array.isArray(stored) ? stored.filter(Boolean).map(restoredMessage) : []);

function restoredMessage(stored) {
  const message = { ...stored, id: String(stored.id ?? newId()), version: Number(stored.version) || 0 };
  const content = String(message.content ?? '');
  if (message.role === 'user') {
    const files = (Array.isArray(message.files) ? message.files : []).filter((file) => typeof file?.id === 'string');
    return { ...message, content, files: files.map((file) => ({ ...file, name: String(file.name ?? ''), size: Number(file.size) || 0 })) };
  }
  const { reasoning, thinkingMs = null, state = 'done', stats, error } = message;
  const failed = state === 'error' ? { error: error ?? { kind: 'cut' } } : {};
  const citations = Array.isArray(message.citations) ? message.citations.filter((one) => typeof one?.text === 'string') : [];
  return { ...message, role: 'assistant', content, reasoning: String(reasoning ?? ''), thinkingMs, state, stats: stats ?? {}, citations, ...failed };
}
