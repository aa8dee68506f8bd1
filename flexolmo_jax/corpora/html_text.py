"""The text of HTML: of short fragments, and of documentation pages without their navigation."""

import re
from html import unescape
from html.parser import HTMLParser


def strip_tags(text: str) -> str:
    """A short HTML fragment as text: block tags become line ends, the others vanish."""
    text = re.sub(r"<(?:br|/?p|/?li|/?ul|/?h\d|/?div)\b[^>]*>", "\n", text, flags=re.IGNORECASE)
    return unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)).strip()


VOID = {"br", "hr", "img", "link", "meta", "input", "col", "wbr"}  # elements that never close
BLOCK = {"p", "div", "li", "dt", "dd", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "table"}
PARAGRAPH = {"p", "pre", "h1", "h2", "h3"}
SKIPPED = {"script", "style", "nav", "head", "button"}
SKIPPED_CLASSES = {"navheader", "navfooter", "sphinxsidebar", "related", "docnav", "footer"}
SKIPPED_CLASSES |= {"headerlink", "toc", "toctree-wrapper", "buttons", "indextable"}


class _Page(HTMLParser):
    """Collects the text of a documentation page without its navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.stack: list[str] = []
        self.skipped_from = 0  # depth of the element being skipped; 0 is none

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK or tag == "br":
            self.parts.append("\n\n" if tag in PARAGRAPH else "\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        if tag in VOID:
            return
        self.stack.append(tag)
        classes = set((dict(attrs).get("class") or "").split())
        if not self.skipped_from and (tag in SKIPPED or classes & SKIPPED_CLASSES):
            self.skipped_from = len(self.stack)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.stack:
            return
        while self.stack.pop() != tag:
            pass
        if len(self.stack) < self.skipped_from:
            self.skipped_from = 0
        if tag in BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped_from:
            inside_pre = "pre" in self.stack
            self.parts.append(data if inside_pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The text of an HTML page's main part; preformatted blocks keep their spaces."""
    main = re.search(r"<main\b|<[^>]*role=\"main\"", page)
    parser = _Page()
    parser.feed(page[main.start() :] if main else page)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n (?=\S)", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()
