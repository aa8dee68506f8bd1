"""Parts of the page, called from Python: events of a stream, words of tokens."""

import functools
import http.server
import threading
from importlib.resources import files as files_of

import pytest


@pytest.fixture(scope="module")
def files():
    """The address of a server that has the page's files, and nothing else."""
    folder = files_of("flexolmo_jax.serving") / "static"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


EVENTS = """async ([path, bytes, cuts]) => {
  const { readEvents } = await import(path);
  const edges = [0, ...cuts, bytes.length];
  const body = new ReadableStream({
    start(controller) {
      const pieces = edges.slice(1).map((end, i) => bytes.slice(edges[i], end));
      for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
      controller.close();
    },
  });
  const found = [];
  for await (const data of readEvents(body)) found.push(data);
  return found;
}"""


def test_events_are_the_same_however_the_bytes_are_cut(files, visit):
    page = visit(files).page
    text = (
        ": hello\ndata: eins ü😀\n\n"
        "data:zwei\r\nid: 1\r\ndata: drei\r\n\r\n"
        "retry: 5\rdata: vier\r\rdata: [DONE]"
    )
    expected = ["eins ü😀", "zwei\ndrei", "vier", "[DONE]"]
    data = list(text.encode())
    cuts = [[i] for i in range(1, len(data))] + [list(range(1, len(data)))]
    for cut in cuts:
        assert page.evaluate(EVENTS, [f"{files}/sse.js", data, cut]) == expected, cut


WORDS = """async ([path, tokens]) => {
  const { Words } = await import(path);
  const words = new Words();
  for (const [text, mass] of tokens) words.add(text, mass);
  return words.list.filter((w) => w.text).map((w) => [w.text, w.mass.share("a")]);
}"""


def test_words_of_tokens(files, visit):
    page = visit(files).page

    def words(*tokens):
        tokens = [(text, {"a": a, "b": 1 - a}) for text, a in tokens]
        return page.evaluate(WORDS, [f"{files}/words.js", tokens])

    assert words((" the", 1), ("or", 0), ("em", 0.5), (" ", 0), ("x", 1)) == [
        ["theorem", 0.5],
        ["x", 1],
    ]
    # A token counts for each of its words by its share of the characters.
    assert words(("ab", 1), ("c d", 0)) == [["abc", pytest.approx(2 / 3)], ["d", 0]]
    assert words(("", 1), ("é", 0), ("\n\n", 1), ("z", 0.25)) == [["é", 0.5], ["z", 0.25]]
    assert words(("ok 数学", 1), ("家", 0)) == [["ok", 1], ["数", 1], ["学", 1], ["家", 0]]
