// Code in colours by highlight.js. Its tree of scopes becomes elements here; the HTML that it also makes is not used.

import { el } from './dom.js';

const LONGEST = 30_000; // characters; longer code stays plain, so that it never takes the page from its reader

/** A function (text, language) -> nodes, or null where the language is unknown. */
export const codeHighlighter = (hljs) => (text, language) => {
  if (text.length > LONGEST || !hljs.getLanguage(language)) return null;
  const { _emitter: emitter } = hljs.highlight(text, { language, ignoreIllegals: true });
  return nodesOf(emitter.rootNode);
};

function nodesOf({ children }) {
  return children.map((child) => {
    if (typeof child === 'string') return document.createTextNode(child);
    const scope = /^[a-z]+/i.exec(child.scope ?? '')?.[0]; // "title.function" counts as "title"
    return scope ? el(`span.hl-${scope}`, {}, ...nodesOf(child)) : el('span', {}, ...nodesOf(child));
  });
}
