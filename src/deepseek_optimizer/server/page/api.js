// Talks to the server that this page came from, in OpenAI's protocol. Addresses are relative, so a proxy may put a path before them.

import { serverEvents } from './server_events.js';

const LONGEST_MESSAGE = 2000;

/**
 * Why there is no (whole) answer. `kind`: 'network' (nothing came), 'http' (a status that is not 200), 'stream' (an error within
 * the stream), 'cut' (the stream ended early). `status`, `message` (the server's words) and `retryAfter` (seconds) where known.
 */
export class ApiError extends Error {
  constructor(kind, { status = null, message = '', retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, retryAfter });
  }
}

/** [{id, context}]: the models of the server, and how many tokens each holds (null where it does not say). */
export async function listModels(key) {
  const response = await request('v1/models', { headers: headers(key) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new ApiError('http', { status: response.status, message: 'v1/models: no list of models' });
  return data
    .filter((model) => typeof model?.id === 'string')
    .map((model) => ({ id: model.id, context: Number.isInteger(model.max_model_len) ? model.max_model_len : null }));
}

/** The chunks of a streamed chat completion; throws an ApiError, also when the stream ends before the answer does. */
export async function* streamChat(body, key, signal) {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { ...headers(key), 'Content-Type': 'application/json', Accept: 'text/event-stream' },
    body: JSON.stringify(body),
    signal,
  });
  let finished = false;
  try {
    for await (const data of serverEvents(response.body)) {
      if (data.trim() === '[DONE]') return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError('stream', { message: messageOf(chunk) });
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError('cut', { message: error.message });
  }
  if (!finished) throw new ApiError('cut');
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function request(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: 'no-store', redirect: 'error', ...options });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError('network', { message: error.message });
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => '');
  throw new ApiError('http', { status: response.status, message: messageOf(text), retryAfter: retryAfter(response) });
}

/** The server's own words: error.message of OpenAI's shape, else the text itself (a proxy's, say). */
function messageOf(body) {
  let found = body;
  if (typeof body === 'string') {
    try {
      found = JSON.parse(body);
    } catch {
      return body.trim().slice(0, LONGEST_MESSAGE);
    }
  }
  const error = found?.error ?? found?.detail ?? found;
  const message = typeof error === 'string' ? error : (error?.message ?? JSON.stringify(error));
  return String(message).slice(0, LONGEST_MESSAGE);
}

/** Retry-After in seconds: a number, or a date. */
function retryAfter(response) {
  const value = response.headers.get('Retry-After');
  if (value === null) return null;
  const wait = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : null;
}
