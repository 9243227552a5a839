"""Reads pages as a browser and a repository do."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

ELEMENTS = {"html", "head", "meta", "title", "style", "body", "header", "div", "p", "h1", "h2", "h3", "pre", "code"}
ELEMENTS |= {"nav", "a", "main", "section", "ul", "li", "figure", "figcaption", "table", "caption", "thead", "tbody"}
ELEMENTS |= {"tr", "th", "td", "details", "summary"}
DRAWN = {"svg", "defs", "g", "path", "use", "text", "tspan", "clippath", "rect", "style"}
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "href", "id", "scope", "style", "role"}
ATTRIBUTES |= {"aria-label", "type", "viewbox", "version", "d", "x", "y", "width", "height", "transform", "xlink:href"}
ATTRIBUTES |= {"clip-path", "xmlns", "xmlns:xlink"}


class Outline(HTMLParser):
    """The elements of a page with their attributes, its text, and every table's rows."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.rows, self.cell = [], [], [], False
        self.feed(text)
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell &= tag not in ("th", "td")

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data


def browsed(markdown):
    """Markdown as a repository's page has it: rendered by another program."""
    return Outline(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
