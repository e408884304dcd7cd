// Server-sent events out of a response body: what fetch gives (EventSource can't POST).

const LONGEST_LINE = 16 * 1024 * 1024;

/** The data of each event of a ReadableStream of bytes, as it comes. A piece of the stream may end anywhere, also in a character. */
export async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      if (rest.length > LONGEST_LINE) throw new Error('a line of the event stream does not end');
      for (const line of lines.map((one) => one.replace(/\r$/, ''))) {
        if (line === '') {
          if (data.length) yield data.join('\n');
          data = [];
        } else if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
      }
    }
    if (data.length) yield data.join('\n');
  } finally {
    reader.cancel().catch(() => {}); // left early: the server must learn that nobody reads on
  }
}
