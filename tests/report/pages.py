"""What a page is made of."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "base"}


class Page(HTMLParser):
    """Collects what a page is made of, and checks that every tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        """All text that is read, in one line."""
        return " ".join(" ".join(self.text).split())

    @property
    def names(self) -> list[str]:
        """The tags in their order."""
        return [tag for tag, _ in self.tags]

    def all(self, wanted: str) -> list[dict[str, str | None]]:
        """Attributes of each tag of a name."""
        return [attributes for tag, attributes in self.tags if tag == wanted]
