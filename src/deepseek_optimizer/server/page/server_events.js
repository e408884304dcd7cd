// Parses server-sent events in a response body of fetch (EventSource does not support POST).

const LONGEST_LINE = 16 * 1024 * 1024;

/** Yields the data of each event in a ReadableStream of bytes. A chunk of the stream may end anywhere, even within a character. */
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
    reader.cancel().catch(() => {}); // if left early, the server must learn that the client is gone
  }
}
