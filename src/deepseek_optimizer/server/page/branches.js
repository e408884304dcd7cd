// Versions of a message. A conversation's `messages` are the visible branch; `others` are the tails of the other branches:
// [{parent, messages}], where `parent` is the id of the message before the tail, or null at the start.

const parentOf = ({ messages }, index) => messages[index - 1]?.id ?? null;
const versionOf = (message) => message.version ?? 0;
const indexOf = ({ messages }, id) => messages.findIndex((message) => message.id === id);

/** All versions of the message at a position of the visible branch, oldest first. */
function versionsAt(conversation, index) {
  const parent = parentOf(conversation, index);
  const aside = conversation.others.filter((tail) => tail.parent === parent).map(({ messages }) => messages[0]);
  const shown = conversation.messages[index];
  return [...aside, ...(shown ? [shown] : [])].sort((a, b) => versionOf(a) - versionOf(b));
}

/** Appends a message, as the newest version at its position. */
export function append(conversation, message) {
  const earlier = versionsAt(conversation, conversation.messages.length);
  if (earlier.length) message.version = versionOf(earlier[earlier.length - 1]) + 1;
  conversation.messages.push(message);
}

/** Hides a message and what follows it; the next message that is added becomes another version of it. */
export function setAside(conversation, id) {
  const index = indexOf(conversation, id);
  if (index >= 0) conversation.others.push({ parent: parentOf(conversation, index), messages: conversation.messages.splice(index) });
}

/** Removes a message and what follows it, with all versions of the latter. */
export function remove(conversation, id) {
  const index = indexOf(conversation, id);
  if (index < 0) return;
  const removed = new Set(conversation.messages.splice(index).map((message) => message.id));
  let tails = conversation.others;
  for (let before = -1; before !== removed.size; ) {
    before = removed.size;
    for (const { parent, messages } of tails) if (removed.has(parent)) for (const message of messages) removed.add(message.id);
    tails = tails.filter(({ parent }) => !removed.has(parent));
  }
  conversation.others = tails;
}

/** {number, count}: the number of the visible version of a message, from 1, and the number of versions. */
export function versionShown(conversation, message) {
  const versions = versionsAt(conversation, conversation.messages.indexOf(message));
  return { number: versions.indexOf(message) + 1, count: versions.length };
}

/** Shows the version `step` positions away, with what followed it; returns whether there is one. */
export function showVersion(conversation, id, step) {
  const index = indexOf(conversation, id);
  const versions = versionsAt(conversation, index);
  const target = versions[versions.findIndex((message) => message.id === id) + step];
  if (!target) return false;
  setAside(conversation, id);
  const tail = conversation.others.find(({ messages }) => messages[0] === target);
  conversation.others = conversation.others.filter((one) => one !== tail);
  conversation.messages.push(...tail.messages);
  return true;
}
