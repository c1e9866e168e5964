"""Checks the links of built pages: ``python docs/check_links.py out/docs``; exit status 1 and a list where some fail.

Every relative ``href`` and ``src`` must lead to a file, every ``#anchor`` to an element of that page. Pages may link to
other sites, but load nothing from there: no script, style sheet, font or picture.
"""

from __future__ import annotations

import pathlib
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon", "modulepreload"):
            self.loads.append(values.get("href", ""))
        elif tag in LOADS and LOADS[tag] in values:
            self.loads.append(values[LOADS[tag]])
        elif tag in ("a", "link") and "href" in values:
            self.links.append(values["href"])


def problems(root: pathlib.Path) -> list[str]:
    built = [path for path in sorted(root.rglob("*.html")) if "_static" not in path.relative_to(root).parts]
    pages = {path.resolve(): Page(path) for path in built}
    found = []
    for path, page in pages.items():
        name = path.relative_to(root.resolve())
        for link in dict.fromkeys([*page.links, *page.loads]):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    found.append(f"{name}: loads {link} from elsewhere")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name}: no file for {link}")
            elif target in pages and unquote(parts.fragment) not in {"", "top"} | pages[target].anchors:
                found.append(f"{name}: no anchor for {link}")
    return found if pages else [f"{root} has no pages"]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python docs/check_links.py FOLDER", file=sys.stderr)
        return 2
    found = problems(pathlib.Path(arguments[0]))
    print("\n".join(found) or "every link and anchor is there")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
