// Requests to the server of this page, in OpenAI's protocol. URLs are relative, so a proxy may add a path prefix.

import { serverEvents } from './server_events.js';

const LONGEST_MESSAGE = 2000;

/**
 * Why there is no complete answer. `kind`: 'network' (no response), 'http' (a status other than 200), 'stream' (an error in the
 * stream), 'cut' (the stream ended early). `status`, `code`, `message` (the server's) and `retryAfter` (seconds): if known.
 */
export class ApiError extends Error {
  constructor(kind, { status = null, code = null, message = '', retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, retryAfter });
  }
}

/**
 * [{id, context, maxFileBytes, maxBodyBytes, maxPictures, sampling}]: the server's models, with the maximum number of tokens, the
 * maximum bytes of a document and of a request (null if unknown), the maximum number of pictures in a request (0: the model reads
 * text only; null: it is not loaded), and the default sampling parameters.
 */
export async function listModels(key) {
  const response = await request('v1/models', { headers: headers(key) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new ApiError('http', { status: response.status, message: 'v1/models: no list of models' });
  return data
    .filter((model) => typeof model?.id === 'string')
    .map((model) => ({
      id: model.id,
      context: whole(model.max_model_len),
      maxFileBytes: whole(model.max_file_bytes),
      maxBodyBytes: whole(model.max_body_bytes),
      maxPictures: whole(model.max_pictures) ?? (model.status ? null : 0), // only one of several models has a status
      sampling: numbers(model.default_sampling),
    }));
}

const numbers = (values) => Object.fromEntries(Object.entries(values ?? {}).filter(([, value]) => Number.isFinite(value)));
const whole = (value) => (Number.isInteger(value) ? value : null);

/** Uploads a document and returns the server's description of it. `sent` is called with the fraction sent, 0 to 1. */
export function uploadFile(file, key, signal, sent) {
  const form = new FormData();
  form.append('purpose', 'user_data');
  form.append('file', file, file.name);
  const http = new XMLHttpRequest(); // fetch reports no upload progress
  http.open('POST', new URL('v1/files', document.baseURI));
  for (const [name, value] of Object.entries(headers(key))) http.setRequestHeader(name, value);
  http.upload.addEventListener('progress', ({ loaded, total }) => sent(total ? loaded / total : 0));
  signal.addEventListener('abort', () => http.abort());
  return new Promise((resolve, reject) => {
    const refuse = (kind, facts) => reject(new ApiError(kind, facts));
    http.addEventListener('error', () => refuse('network'));
    http.addEventListener('abort', () => refuse('cut'));
    http.addEventListener('load', () => {
      const { status } = http;
      const found = parsed(http.responseText);
      if (status === 200 && typeof found?.id === 'string') return resolve(found);
      refuse('http', { status, code: codeOf(http.responseText), message: messageOf(http.responseText), retryAfter: retryAfter(http.getResponseHeader('Retry-After')) });
    });
    http.send(form);
  });
}

/** Whether the server still has a document; true if the request fails. */
export async function hasFile(id, key) {
  return request(`v1/files/${encodeURIComponent(id)}`, { headers: headers(key) }).then(() => true, (error) => error.status !== 404);
}

/** Deletes a document without waiting; if that fails, it expires. */
export function deleteFile(id, key) {
  request(`v1/files/${encodeURIComponent(id)}`, { method: 'DELETE', headers: headers(key), keepalive: true }).catch(() => {});
}

/** Yields the chunks of a streamed chat completion; throws an ApiError, also if the stream ends before the answer does. */
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
  throw new ApiError('http', { status: response.status, code: codeOf(text), message: messageOf(text), retryAfter: retryAfter(response.headers.get('Retry-After')) });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const codeOf = (text) => parsed(text)?.error?.code ?? null;

/** The server's message: error.message in OpenAI's format, or else the text itself (for example a proxy's). */
function messageOf(body) {
  const found = typeof body === 'string' ? parsed(body) : body;
  if (found === null) return String(body).trim().slice(0, LONGEST_MESSAGE);
  const error = found?.error ?? found?.detail ?? found;
  const message = typeof error === 'string' ? error : (error?.message ?? JSON.stringify(error));
  return String(message).slice(0, LONGEST_MESSAGE);
}

/** Retry-After in seconds: a number, or a date. */
function retryAfter(value) {
  if (value === null) return null;
  const wait = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : null;
}
