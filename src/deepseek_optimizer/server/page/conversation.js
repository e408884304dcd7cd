// A conversation as plain data, as it is stored, sent and exported.
//
// {id, title, named, created, updated, model, system, settings, messages, others}, where `others` are the hidden branches (see
// branches.js). A message is {id, role, content}, with {version} if there are several, {files} (see files.js) and {pictures} if the
// user attached some and, if a model wrote it, {reasoning, thinkingMs, state, error, finish, stats, citations, document}. A picture
// is {name, url, width, height}, where `url` contains it.
// `state`: 'streaming', 'done', 'stopped', 'interrupted' or 'error'.

import { append } from './branches.js';
import { cleanSettings } from './sampling.js';

const LONGEST_TITLE = 60;
export const LONGEST_PICTURE = 1e6; // characters of a picture's URL
const LONGEST_PICTURES = 3e6; // of those of a conversation
const PICTURES_OF_BODY = 0.75; // of the largest request that the server accepts
const PICTURE_URL = /^data:image\/(png|jpeg);base64,[A-Za-z0-9+/]+=*$/;

/** A random id; unlike crypto.randomUUID, it is also available over plain HTTP. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

export function newConversation({ model = null, system = '', settings = {} } = {}) {
  const now = Date.now();
  return { id: newId(), title: '', named: false, created: now, updated: now, model, system, settings, messages: [], others: [] };
}

/** Adds a message of the user; `attached`: {files, pictures}. */
export function addUser(conversation, content, { files = [], pictures = [] } = {}) {
  const more = { ...(files.length ? { files } : {}), ...(pictures.length ? { pictures } : {}) };
  append(conversation, { id: newId(), role: 'user', content, ...more });
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
  const attached = new Map(); // message -> parts of its files and pictures
  for (const { role, content, files = [], pictures = [] } of conversation.messages) {
    const last = messages[messages.length - 1];
    if (role === 'assistant' && !content) continue;
    if (last?.role === role) last.content = [last.content, content].filter(Boolean).join('\n\n');
    else messages.push({ role, content });
    const message = messages[messages.length - 1];
    attached.set(message, [...(attached.get(message) ?? []), ...filesAsParts(files), ...picturesAsParts(pictures)]);
  }
  for (const [message, parts] of attached) {
    if (parts.length) message.content = [...parts, ...(message.content ? [{ type: 'text', text: message.content }] : [])];
  }
  return { model, messages, stream: true, stream_options: { include_usage: true }, ...conversation.settings };
}

const filesAsParts = (files) => files.filter(({ gone }) => !gone).map(({ id }) => ({ type: 'file', file: { file_id: id } }));
const picturesAsParts = (pictures) => pictures.map(({ url }) => ({ type: 'image_url', image_url: { url } }));

/** {count, characters}: the pictures that a conversation's messages may still get; `model`: as in api.js, or null. */
export function roomForPictures({ messages }, model) {
  const urls = messages.flatMap(({ pictures = [] }) => pictures.map(({ url }) => url));
  const most = Math.min(LONGEST_PICTURES, PICTURES_OF_BODY * (model?.maxBodyBytes ?? Infinity));
  return { count: (model?.maxPictures ?? 0) - urls.length, characters: most - urls.reduce((sum, url) => sum + url.length, 0) };
}

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

/** Pictures that were stored, without those whose URL is another one, which an imported file may contain. */
export const restoredPictures = (stored) =>
  (Array.isArray(stored) ? stored : [])
    .filter((one) => typeof one?.url === 'string' && one.url.length <= LONGEST_PICTURE && PICTURE_URL.test(one.url))
    .map(({ name, url, width, height }) => ({ name: String(name ?? ''), url, width: Number(width) || 1, height: Number(height) || 1 }));

function restoredMessage(stored) {
  const message = { ...stored, id: String(stored.id ?? newId()), version: Number(stored.version) || 0 };
  const content = String(message.content ?? '');
  if (message.role === 'user') {
    const files = (Array.isArray(message.files) ? message.files : []).filter((file) => typeof file?.id === 'string');
    const named = files.map((file) => ({ ...file, name: String(file.name ?? ''), size: Number(file.size) || 0 }));
    return { ...message, content, files: named, pictures: restoredPictures(message.pictures) };
  }
  const { reasoning, thinkingMs = null, state = 'done', stats, error } = message;
  const failed = state === 'error' ? { error: error ?? { kind: 'cut' } } : {};
  const citations = Array.isArray(message.citations) ? message.citations.filter((one) => typeof one?.text === 'string') : [];
  return { ...message, role: 'assistant', content, reasoning: String(reasoning ?? ''), thinkingMs, state, stats: stats ?? {}, citations, ...failed };
}
