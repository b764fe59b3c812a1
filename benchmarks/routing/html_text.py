"""HTML pages of manuals as plain text: headings as Markdown's, paragraphs and list items as lines, code as it is."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_BLOCKS = {*"p div section article table ul ol dl dt dd li tr pre blockquote br hr td th".split(), *_HEADINGS}
_SKIPPED = frozenset("head script style nav footer form select svg button".split())
_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
# What surrounds a page in Sphinx, DocBook, AsciiDoc and Apache's manual: menus, breadcrumbs, feet.
_FURNITURE = frozenset(
    "navheader navfooter related sphinxsidebar footer headerlink toc toctree-wrapper contents breadcrumbs quickview "
    "seealso up toplang bottomlang topnav menu mainmenu searchmenu mobilesubmenu nosearch rightsidebar".split()
)
_FURNITURE_IDS = frozenset("footer page-header path quickview toc comments_thread comments_section hdtb".split())


class _Reader(HTMLParser):
    """Collects lines; what stands in skipped elements is left out. Unclosed `p` and `li` do no harm, as only the
    elements that skip are counted."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.first_heading = ""
        self._lines: list[str] = []
        self._line: list[str] = []
        self._heading = 0
        self._skipping: list[str] = []
        self._pre = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" and not self.title:
            self._in_title = True
        if self._skipping:
            if tag not in _VOID and tag == self._skipping[0]:
                self._skipping.append(tag)
            return
        names = dict(attrs)
        classes = set((names.get("class") or "").split())
        if tag in _SKIPPED or classes & _FURNITURE or names.get("id") in _FURNITURE_IDS:
            if tag not in _VOID:
                self._flush()
                self._skipping.append(tag)
            return
        if tag in _BLOCKS:
            self._flush()
        if tag in _HEADINGS:
            self._heading = _HEADINGS[tag]
        elif tag == "pre":
            self._pre += 1
        elif tag == "li":
            self._line.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.pop()
            return
        if tag in _BLOCKS:
            self._flush()
        if tag in _HEADINGS:
            self._heading = 0
        elif tag == "pre" and self._pre:
            self._pre -= 1
        if tag in ("pre", "ul", "ol"):
            self._lines.append("")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif self._skipping:
            return
        elif self._pre:
            for number, line in enumerate(data.split("\n")):
                if number:
                    self._flush()
                self._line.append(line)
        else:
            self._line.append(re.sub(r"\s+", " ", data))

    def _flush(self) -> None:
        text = "".join(self._line)
        self._line = []
        # Signs that only link to a place of the page.
        text = re.sub(r"[¶\ue000-\uf8ff\u200b]", "", text)
        text = text.rstrip() if self._pre else text.strip()
        if not text.strip(" -"):
            return
        if self._heading:
            self.first_heading = self.first_heading or text
            self._lines += ["", f"{'#' * self._heading} {text}", ""]
        else:
            self._lines.append(text)
            if not self._pre and not text.startswith("- "):
                self._lines.append("")

    def text(self) -> str:
        """What was read."""
        self._flush()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip() + "\n"


def read_html(html: str) -> tuple[str, str]:
    """The title (of `<title>`, else the first heading; in one line) and the text of a page."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    text = reader.text()
    return " ".join((reader.title or reader.first_heading).split()), text
