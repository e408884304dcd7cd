// Finds conversations by their titles and messages.

const BEFORE = 24; // characters of a message that are shown before the match
const AFTER = 80;

/**
 * [{conversation, excerpt}] of the conversations that contain the text; `excerpt`: [before, match, after] of a message, or null if
 * the match is in the title.
 */
export function search(conversations, query) {
  const wanted = query.trim() && new RegExp(query.trim().replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'), 'iu');
  const found = [];
  for (const conversation of conversations) {
    if (!wanted) found.push({ conversation, excerpt: null });
    else {
      const inTitle = wanted.test(conversation.title);
      const excerpt = inTitle ? null : excerptOf(conversation, wanted);
      if (inTitle || excerpt) found.push({ conversation, excerpt });
    }
  }
  return found;
}

function excerptOf({ messages }, wanted) {
  for (const { content } of messages) {
    const match = wanted.exec(content);
    if (!match) continue;
    const at = match.index;
    const end = at + match[0].length;
    const from = Math.max(0, at - BEFORE);
    const before = (from ? '…' : '') + content.slice(from, at);
    return [before, content.slice(at, end), content.slice(end, end + AFTER)].map((text) => text.replace(/\s+/g, ' '));
  }
  return null;
}
