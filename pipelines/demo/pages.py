"""The pages of the demo web: plain HTML as people write it, `<img alt>` and `<figure>`, with links to walk along.

A host has a front page, which links to all its pages and to the other hosts, and pages of a dozen images. The page
titles speak of nothing that is to be seen, as most titles do.
"""

import posixpath
from collections import defaultdict
from html import escape
from itertools import pairwise

from pipelines.demo.plan import ALL_HOSTS, HOSTS, Slot, stream
from pipelines.demo.texts import pick

IMAGES_PER_PAGE = 12
SHOWN_TWICE = 0.02  # share of ordinary images that stand on the next page too
TITLES = ("From the sketchbook", "Our workshop", "Sunday album", "New this week", "What we made", "Old favourites")
ROBOTS = "User-agent: *\nDisallow: /private/\n"

Page = tuple[str, str]  # host, path


def layout(slots: list[Slot], seed: int) -> dict[Page, list[Slot]]:
    """Which slots stand on which page, pages in reading order."""
    shelves: dict[Page, list[Slot]] = defaultdict(list)
    for slot in slots:
        shelves[slot.page_host, slot.page_folder].append(slot)
    pages: dict[Page, list[Slot]] = {}
    for (host, folder), shelf in sorted(shelves.items(), key=lambda item: item[0]):
        starts = range(0, len(shelf), IMAGES_PER_PAGE)
        paths = [(host, f"{folder}/page-{n + 1}.html") for n in range(len(starts))]
        pages |= {page: shelf[at : at + IMAGES_PER_PAGE] for page, at in zip(paths, starts, strict=True)}
        for page, following in pairwise(paths):
            pages[following] = [s for s in pages[page] if _twice(s, seed)] + pages[following]
    return pages


def _twice(slot: Slot, seed: int) -> bool:
    return slot.defect is None and stream(seed, "page", slot.index).random() < SHOWN_TWICE


def write_pages(pages: dict[Page, list[Slot]], seed: int, port: int) -> dict[Page, str]:
    """The HTML of every page and of the hosts' front pages."""
    documents = {}
    for n, (page, slots) in enumerate(pages.items()):
        rng = stream(seed, "page", 1_000_000 + n)
        links = [("Home", "/"), *_neighbours(page, pages), ("A friend", f"http://{pick(rng, HOSTS)}:{port}/")]
        title = f"{pick(rng, TITLES)}, part {page[1].rpartition('-')[2].removesuffix('.html')}"
        body = "\n".join(_item(slot, page, port) for slot in slots)
        documents[page] = _document(title, links, body, noai=page[1].startswith("/studio/"))
    for host in ALL_HOSTS:
        links = [(path.strip("/"), path) for page_host, path in pages if page_host == host]
        links += [(f"Friends at {other}", f"http://{other}:{port}/") for other in ALL_HOSTS if other != host]
        documents[host, "/index.html"] = _document(f"Welcome to {host}", links, "<p>Pictures on every page.</p>")
    return documents


def _neighbours(page: Page, pages: dict[Page, list[Slot]]) -> list[tuple[str, str]]:
    host, path = page
    stem, _, number = path.removesuffix(".html").rpartition("-")
    steps = (("Back", int(number) - 1), ("On", int(number) + 1))
    found = ((label, f"{stem}-{n}.html") for label, n in steps if (host, f"{stem}-{n}.html") in pages)
    return [(label, posixpath.basename(target)) for label, target in found]


def source(slot: Slot, page: Page, port: int) -> str:
    """What stands in `src`: relative on the page's own host, absolute elsewhere."""
    if slot.host == page[0]:
        return posixpath.relpath(slot.path, posixpath.dirname(page[1]))
    return f"http://{slot.host}:{port}{slot.path}"


def _item(slot: Slot, page: Page, port: int) -> str:
    alt = escape(slot.shown["alt"].text) if "alt" in slot.shown else ""
    image = f'<img src="{source(slot, page, port)}" alt="{alt}">'
    if "caption" not in slot.shown:
        return f"<p>{image}</p>"
    return f"<figure>{image}<figcaption>{escape(slot.shown['caption'].text)}</figcaption></figure>"


def _document(title: str, links: list[tuple[str, str]], body: str, noai: bool = False) -> str:
    robots = '<meta name="robots" content="noai">\n' if noai else ""
    menu = "\n".join(f'<li><a href="{escape(href)}">{escape(label)}</a></li>' for label, href in links)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{robots}'
        f"<title>{escape(title)}</title>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n<nav><ul>\n{menu}\n</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
