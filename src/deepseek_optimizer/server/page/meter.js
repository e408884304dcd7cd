// The line under the message box: how full the model's context is, and how fast the answer comes.

import { byId } from './dom.js';
import { number, t } from './i18n.js';
import { statsText } from './message_view.js';

const NEARLY_FULL = 0.9;

/** Tokens of a finished answer's conversation that the model still held: a sliding window lets go of the oldest. */
const held = ({ promptTokens, completionTokens, contextTokens }) =>
  contextTokens ?? (promptTokens ?? 0) + (completionTokens ?? 0);

/** Tokens that the conversation took when it was last answered: {used, exact}; while an answer comes, with what came so far. */
function contextUse(messages) {
  const answers = messages.filter((message) => message.stats?.tokens);
  const last = answers[answers.length - 1];
  if (!last) return { used: 0, exact: true };
  const { exact, tokens } = last.stats;
  if (exact) return { used: held(last.stats), exact };
  return { used: held(answers[answers.length - 2]?.stats ?? {}) + tokens, exact: false };
}

/** `context`: tokens the model holds, or null; `answer`: the one on its way, or null. */
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
