// The line below the message box: the use of the model's context, and the speed of the answer.

import { byId } from './dom.js';
import { number, t } from './i18n.js';
import { statsText } from './message_view.js';

const NEARLY_FULL = 0.9;

/** Number of tokens in the model's context after an answer; a sliding window drops the oldest. */
const held = ({ promptTokens, completionTokens, contextTokens }) =>
  contextTokens ?? (promptTokens ?? 0) + (completionTokens ?? 0);

/** Number of tokens of the conversation at its last answer, including an answer in progress: {used, exact}. */
function contextUse(messages) {
  const answers = messages.filter((message) => message.stats?.tokens);
  const last = answers[answers.length - 1];
  if (!last) return { used: 0, exact: true };
  const { exact, tokens } = last.stats;
  if (exact) return { used: held(last.stats), exact };
  return { used: held(answers[answers.length - 2]?.stats ?? {}) + tokens, exact: false };
}

/** `context`: maximum number of tokens, or null; `answer`: the one in progress, or null. */
export function showMeter(conversation, context, answer) {
  const { used, exact } = contextUse(conversation.messages);
  const meter = byId('context-meter');
  const text = context
    ? t('contextUse', { used: number(used), all: number(context), percent: number((100 * used) / context) })
    : t('contextUseOpen', { used: number(used) });
  byId('context-text').textContent = exact ? text : t('aboutPrefix', { text });
  byId('context').hidden = used === 0;
  meter.hidden = !context;
  const share = context ? Math.min(1, used / context) : 0;
  meter.setAttribute('aria-valuenow', String(Math.round(share * 100)));
  meter.setAttribute('aria-valuetext', text);
  meter.classList.toggle('full', share > NEARLY_FULL);
  meter.firstElementChild.style.setProperty('width', `${share * 100}%`);
  byId('speed').textContent = answer ? statsText(answer.message.stats).join('') : '';
}
