// Passages of documents below an answer. Their text comes from the document and is never parsed.

import { el, icon } from './dom.js';
import { t } from './i18n.js';

const MAX = 50;

/** The server's annotations, reduced to the fields that are displayed; nothing in them is trusted. */
export function readCitations(annotations) {
  if (!Array.isArray(annotations)) return [];
  return annotations
    .filter((one) => one?.type === 'file_citation' && typeof one.text === 'string')
    .slice(0, MAX)
    .map(({ filename, text, page, line }) => ({
      name: String(filename ?? ''),
      text,
      page: Number.isInteger(page) ? page : null,
      line: Number.isInteger(line) ? line : null,
    }));
}

/** A list whose items open the passages; null if there are none. */
export function citationsNode(citations, document) {
  if (!citations?.length) return null;
  const items = citations.map((one, index) =>
    el(
      'li',
      {},
      el(
        'details.citation',
        {},
        el('summary', {}, icon('chevron'), el('span.citation-number', {}, String(index + 1)), el('bdi.citation-name', {}, one.name), placeOf(one)),
        el('blockquote', { dir: 'auto' }, one.text),
      ),
    ),
  );
  const how = { retrieve: t('howRetrieve'), map_reduce: t('howMapReduce') }[document?.strategy];
  return el('section.citations', { 'aria-label': t('citations') }, el('h3', {}, t('citations')), how && el('p.hint', {}, how), el('ol', {}, ...items));
}

function placeOf({ page, line }) {
  if (page !== null) return el('span.citation-place', {}, t('page', { n: page }));
  return line !== null && el('span.citation-place', {}, t('line', { n: line }));
}
