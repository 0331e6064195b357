"""The page of `fbpc report`, as a browser sees it."""

from html.parser import HTMLParser
from pathlib import Path

from fbpc_ray.commands import main


class Page(HTMLParser):
    """What a browser sees of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.tables, self.codes, self.text = path.read_text(), [], [], [], ""
        self._in: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "code":
            self.codes.append("")
        if tag not in ("img", "input", "meta"):
            self._in.append(tag)

    def handle_endtag(self, tag):
        assert self._in.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self._in:
            return
        self.text += data
        if {"td", "th"} & set(self._in):
            self.tables[-1][-1][-1] += data
        if "code" in self._in:
            self.codes[-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def table(self, *heads: str) -> list[list[str]]:
        """The lines of the first table with these first heads."""
        return next(table[1:] for table in self.tables if tuple(table[0][: len(heads)]) == heads)


def report_page(tmp_path: Path, *folders: Path | str) -> Page:
    main.main(["report", *map(str, folders), "--out", str(tmp_path / "made.html")])
    return Page(tmp_path / "made.html")
