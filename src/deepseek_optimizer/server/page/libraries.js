// The libraries in vendor/ (listed in vendor.json). They are downloaded when the package is built; an installation that was built
// without network access has none, and its page shows answers as plain text with a notice.

/** {markdownit, footnote, katex, hljs}, or null if a library is missing. */
export async function loadLibraries() {
  try {
    const [{ default: markdownit }, { default: footnote }, { default: hljs }] = await Promise.all([
      import('./vendor/markdown-it.js'),
      import('./vendor/markdown-it-footnote.js'),
      import('./vendor/highlight.js'),
      import('./vendor/katex.js'), // defines a global
    ]);
    return { markdownit, footnote, hljs, katex: globalThis.katex };
  } catch {
    return null;
  }
}
