// The libraries in vendor/ (listed in vendor.json). They are downloaded when the package is built. An installation built without
// network access lacks them; its page shows answers as plain text, with a notice.

/** {markdownit, footnote, katex, hljs}, or null if a library is missing or fails to load. */
export async function loadLibraries() {
  try {
    const [{ default: markdownit }, { default: footnote }, { default: hljs }] = await Promise.all([
      import('./vendor/markdown-it.js'),
      import('./vendor/markdown-it-footnote.js'),
      import('./vendor/highlight.js'),
      import('./vendor/katex.js'), // defines a global
    ]);
    return { markdownit, footnote, hljs, katex: globalThis.katex };
  } catch (error) {
    console.warn('A library of the chat page could not be loaded; answers are shown as plain text.', error);
    return null;
  }
}
