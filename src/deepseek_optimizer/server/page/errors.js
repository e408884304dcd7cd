// Messages for the errors of api.js.

import { number, t } from './i18n.js';

const KNOWN = [401, 403, 404, 413, 429, 503];

/** {title, detail}: what happened, and the server's message; both are plain text. */
export function describeError({ kind, status, code, message, retryAfter }) {
  if (code === 'file_not_found') return { title: t('errorFileGone'), detail: '' };
  const wait = retryAfter === null || retryAfter === undefined ? '' : t('retryAfter', { n: number(retryAfter) });
  const titles = { network: 'errorNetwork', cut: 'errorCut', stream: 'errorStream' };
  const title = titles[kind] ? t(titles[kind]) : KNOWN.includes(status) ? t(`error${status}`) : t('errorHttp', { status });
  const detail = kind === 'network' || kind === 'cut' ? '' : message; // the browser's message about a connection is of no use
  return { title: [title, wait].filter(Boolean).join(' '), detail };
}
