// Syntax highlighting by highlight.js. Its tree of scopes is converted to elements here; its HTML output is not used.

import { el } from './dom.js';

const LONGEST = 30_000; // characters; longer code is not highlighted, so that it cannot block the page

/** A function (text, language) -> nodes, or null if the language is unknown. */
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
