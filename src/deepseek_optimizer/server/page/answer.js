// One answer in progress: reads the stream into a message, and measures its speed. No DOM here.

import { ApiError, streamChat } from './api.js';
import { readCitations } from './citations.js';

const SHORTEST_MS = 100; // an answer that arrived faster was buffered, so its speed cannot be measured

export class Answer {
  /** Fills `message` (see conversation.js) with the answer to the request `body`; calls `changed` after each chunk. */
  constructor(message, body, key, changed) {
    Object.assign(this, { message, body, key, changed });
    this.controller = new AbortController();
    this.pieces = 0;
    this.firstAt = this.lastAt = this.contentAt = null;
    this.readPart = null; // fraction of the documents processed before the first token, 0 to 1
  }

  stop() {
    this.controller.abort();
  }

  /** Ends the answer because the page is being closed; what has arrived stays in the message. */
  interrupt() {
    this.endThinking();
    this.message.state = 'interrupted';
    this.controller.abort();
  }

  /** Runs until the answer is complete, stopped or failed, as message.state tells. Throws only for bugs of this page. */
  async run() {
    const { message } = this;
    this.startedAt = performance.now();
    try {
      for await (const chunk of streamChat(this.body, this.key, this.controller.signal)) {
        this.take(chunk);
        this.changed();
      }
      message.state = 'done';
    } catch (error) {
      if (message.state === 'interrupted') return; // the page is being closed
      if (this.controller.signal.aborted) message.state = 'stopped';
      else {
        message.state = 'error';
        const { kind = 'network', status = null, code = null, retryAfter = null } = error;
        message.error = { kind, status, code, retryAfter, message: error.message };
        if (!(error instanceof ApiError)) throw error;
      }
    } finally {
      this.endThinking();
      this.changed();
    }
  }

  take(chunk) {
    const choice = chunk.choices?.[0];
    const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? '';
    const content = choice?.delta?.content ?? '';
    if (thought || content) {
      this.pieces += 1;
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
    }
    if (thought) this.thinkingFrom ??= this.lastAt;
    if (content) this.endThinking();
    this.message.reasoning += thought;
    this.message.content += content;
    this.takeDocument(choice?.delta ?? {});
    if (choice?.finish_reason) this.message.finish = choice.finish_reason;
    this.measure(chunk.usage);
  }

  /** The progress of reading documents and, at the end, the passages that support the answer. */
  takeDocument({ document, annotations }) {
    if (Number.isFinite(document?.read) && Number.isFinite(document?.left)) {
      this.readPart = document.read / Math.max(1, document.read + document.left);
    } else if (document?.strategy) {
      this.message.document = { strategy: String(document.strategy), contextTokens: document.context_tokens ?? null };
    }
    if (annotations) this.message.citations = readCitations(annotations);
  }

  endThinking() {
    if (this.thinkingFrom === undefined || this.message.thinkingMs !== null) return;
    this.message.thinkingMs = performance.now() - this.thinkingFrom;
  }

  /** Milliseconds of reasoning so far. */
  get thinkingMs() {
    return this.message.thinkingMs ?? performance.now() - this.thinkingFrom;
  }

  /** Until the server sends its count, each chunk counts as one token. */
  measure(usage) {
    const { stats } = this.message;
    if (usage) {
      stats.promptTokens = usage.prompt_tokens ?? null;
      stats.completionTokens = usage.completion_tokens ?? null;
      stats.droppedTokens = usage.dropped_tokens ?? 0;
      stats.contextTokens = usage.context_tokens ?? this.message.document?.contextTokens ?? null;
    }
    stats.exact = Boolean(usage) && stats.completionTokens !== null;
    stats.tokens = stats.exact ? stats.completionTokens : this.pieces;
    if (this.firstAt === null) return;
    stats.firstTokenMs = this.firstAt - this.startedAt;
    const span = this.lastAt - this.firstAt;
    const several = this.readPart !== null; // prompts: the counts include more than this answer
    stats.tokensPerSecond = stats.tokens > 1 && span > SHORTEST_MS && !several ? ((stats.tokens - 1) * 1000) / span : null;
  }
}
