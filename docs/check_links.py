"""Follows every link of the built site that stays within it, and finds what pages fetch from elsewhere.

python docs/check_links.py build/site
"""

import pathlib
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to and fetches, and the names in it that can be linked to."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [link for name in ("href", "src") if (link := given.get(name))]
        if tag == "link" and given.get("rel") == "stylesheet":
            self.fetched.append(given.get("href") or "")
        self.fetched.append(given.get("src") or "")
        self.names |= {name for key in ("id", "name") if (name := given.get(key))}


def broken(site: pathlib.Path) -> list[str]:
    """A line for each link to what is not there, and for each script, style or image from elsewhere."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found: list[str] = []
    for path, page in pages.items():
        beyond = [link for link in page.fetched if urlsplit(link).netloc]
        found += [
            f"{path.relative_to(site.resolve())}: {link}: needs the network" for link in beyond
        ]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{path.relative_to(site.resolve())}: {link}: no such file")
            elif name and target in pages and name not in pages[target].names:
                found.append(
                    f"{path.relative_to(site.resolve())}: {link}: no such place on the page"
                )
    if not pages:
        found.append(f"{site}: no page")
    return found


if __name__ == "__main__":
    problems = broken(pathlib.Path(sys.argv[1]))
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    sys.exit(bool(problems))
