// Server-sent events of a response, however the network cut its bytes.
// The form is the one of https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation.

/** Yields the data of each event of a body (a ReadableStream of bytes), comments left out. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value = "", done } = await reader.read();
      // At the end, a proxy may have dropped the last line break.
      const { lines, rest: next } = splitLines(rest + value + (done ? "\n\n" : ""));
      rest = next;
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The complete lines of a text. A final CR waits, because an LF of the same line break may follow. */
function splitLines(text) {
  const waiting = text.endsWith("\r") ? "\r" : "";
  const lines = text.slice(0, text.length - waiting.length).split(/\r\n|\n|\r/);
  return { rest: lines.pop() + waiting, lines };
}
