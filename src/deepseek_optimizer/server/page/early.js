// Runs before the first paint (a classic script, not a module), so that the page does not flash in the wrong colors or language.
(() => {
  const root = document.documentElement;
  const read = (name) => {
    try {
      return localStorage.getItem(name);
    } catch {
      return null; // storage is not allowed: the browser's settings apply
    }
  };
  const theme = read('dso.theme');
  if (theme === 'light' || theme === 'dark') root.dataset.theme = theme;
  const language = read('dso.language') ?? navigator.language ?? 'en';
  root.lang = language.toLowerCase().startsWith('zh') ? 'zh-CN' : 'en';
})();
