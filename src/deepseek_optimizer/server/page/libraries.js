// The libraries of vendor/ (vendor.json lists them). They are fetched when the package is built, so an installation that was built
// without a network has none; the page then shows answers as plain text and says so.

/** {markdownit, footnote, katex, hljs}, or null where a library is missing. */
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
