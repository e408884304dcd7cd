// One answer on its way: reads the stream into a message, and measures it. No DOM here.

import { ApiError, streamChat } from './api.js';
import { readCitations } from './citations.js';

const SHORTEST_MS = 100; // what came all at once was buffered on its way, and has no speed

export class Answer {
  /** Fills `message` (see conversation.js) with what `body` asks for; `changed` is called after each piece. */
  constructor(message, body, key, changed) {
    Object.assign(this, { message, body, key, changed });
    this.controller = new AbortController();
    this.pieces = 0;
    this.firstAt = this.lastAt = this.contentAt = null;
    this.readPart = null; // of documents that are read before the first word, 0 to 1
  }

  stop() {
    this.controller.abort();
  }

  /** The page goes away: what has arrived is what will be kept. */
  interrupt() {
    this.endThinking();
    this.message.state = 'interrupted';
    this.controller.abort();
  }

  /** Until the answer is whole, stopped or failed: message.state says which. Only a mistake of this page's own throws. */
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
      if (message.state === 'interrupted') return; // the page is going away
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

  /** How far documents are read, and at the end the passages that support the answer. */
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

  /** Milliseconds of thinking so far. */
  get thinkingMs() {
    return this.message.thinkingMs ?? performance.now() - this.thinkingFrom;
  }

  /** Until the server's count comes, each piece is taken for one token. */
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
    const several = this.readPart !== null; // prompts: what came is not all that was counted
    stats.tokensPerSecond = stats.tokens > 1 && span > SHORTEST_MS && !several ? ((stats.tokens - 1) * 1000) / span : null;
  }
}
