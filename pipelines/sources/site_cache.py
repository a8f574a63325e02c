"""Pages that say of themselves when they change: what one crawl read of them, the next one asks for conditionally.

`cache/pages/<source>.jsonl` holds the records of the latest crawl's pages that came with an ETag or a Last-Modified
(RFC 9110, 13.1). An answer of 304 means that the record still holds, under whatever opt-out its headers bring. A page
that may be used until some date only isn't kept, for the record doesn't know when it ends.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairs.store import Store
from pairs.workspace import Workspace
from pipelines.sources.html_page import NO_FOLLOW, forbids, is_dated
from pipelines.sources.site import VERSION, read_pages, without_dead

CONDITION = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
VALIDATORS = tuple(CONDITION)
VALIDATOR_CHARS = 1000
Page = dict[str, Any]


def place(config: Mapping[str, Any]) -> tuple[Store, str]:
    """The workspace and the path in it, from `pages`: <workspace>/crawl/<source>/<increment>/pages.jsonl."""
    pages = Path(config["pages"])
    return Store(pages.parents[3]), f"cache/pages/{pages.parts[-3]}.jsonl"


def load_unchanging(config: Mapping[str, Any]) -> dict[str, Page]:
    """The kept pages by canonical URL; none where another program, or we under another name, read them."""
    store, path = place(config)
    lines = store.read(path).decode().splitlines() if store.has(path) else []
    if not lines or json.loads(lines[0]) != _reader(config):
        return {}
    return {page["key"]: page for page in map(json.loads, lines[1:])}


def save_unchanging(config: Mapping[str, Any]) -> None:
    """Keeps this crawl's pages that have a validator, but for what is forgotten; those that it didn't meet any more are
    let go, unless it met none."""
    store, path = place(config)
    recorded, dead = Path(config["pages"]), Workspace(store).tombstones()
    if all(page["failure"] for page in read_pages(recorded)):
        return
    living = (without_dead(page, dead) for page in read_pages(recorded))
    pages = (page for page in living if page and any(page.get(name) for name in VALIDATORS))
    with store.writing(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in itertools.chain([_reader(config)], pages))


def conditions(page: Page | None) -> dict[str, str]:
    """The request headers that ask whether `page` has changed."""
    return {CONDITION[name]: page[name] for name in VALIDATORS if page.get(name)} if page else {}


def validators(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What of an answer's headers can be asked with."""
    told = {name.lower(): value for name, value in headers}
    found = {name: told.get(name.lower(), "") for name in VALIDATORS}
    return {name: value for name, value in found.items() if value and len(value) <= VALIDATOR_CHARS}


def unchanged(before: Page, headers: Sequence[tuple[str, str]], agent: str) -> Page:
    """The earlier record, under what the headers have brought since; where that changes it, or ends some day, the next
    crawl asks for the page whole."""
    words, opt_out = forbids(headers, [], False, agent)
    links = [] if words & NO_FOLLOW else before["links"]
    now = before | {"opt_out": before["opt_out"] or opt_out, "links": links}
    if now != before or is_dated(headers):
        return {name: value for name, value in now.items() if name not in VALIDATORS}
    return now | validators(headers)


def _reader(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a record of a page depends on beside the page."""
    return {"site": VERSION, "agent": config["agent"]}
