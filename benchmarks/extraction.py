"""Pairs found in a WARC and the time for it, against an independent extractor (warcio, BeautifulSoup on lxml).

    apt-get download opencv-doc gimp-help-en python-skimage-doc && for f in *.deb; do dpkg -x $f docs; done
    python -m http.server 8123 --bind 127.0.0.1 --directory docs/usr/share &
    wget -q -r -l inf --warc-file=docs -O /dev/null --reject-regex '\\.(png|jpe?g|gif|svg|js|css|gz)$' http://127.0.0.1:8123/
    python benchmarks/extraction.py docs.warc.gz [--pages 2000] [--repeats 5]

A pair is (page, image address, kind of text, text without white space). The other extractor is written for this
comparison from the words of docs/recipes.md and shares no code with ours. Prints recall, precision, disagreements,
and pages per second of one core for both, in turn, with the ratio's spread.
"""

import argparse
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin

from bs4 import BeautifulSoup, Tag
from warcio.archiveiterator import ArchiveIterator
from warcio.warcwriter import WARCWriter

from pipelines.sources.archive_files import Limits
from pipelines.sources.warc import read_pages

Pair = tuple[str, str, str, str]
LIMITS = Limits("pairmill/1 (+x)", 5_000_000)
LAZY = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-original-src", "data-hi-res-src")


def ours(data: bytes) -> Iterator[Pair]:
    for _, rows, _ in read_pages(io.BytesIO(data), LIMITS):
        for row in rows:
            yield from (_pair(row["page"], row["url"], t["kind"], t["text"]) for t in row["texts"])


def theirs(data: bytes) -> Iterator[Pair]:
    for record in ArchiveIterator(io.BytesIO(data)):
        head = record.http_headers
        if (
            record.rec_type == "response"
            and head.get_statuscode() == "200"
            and "html" in head.get_header("Content-Type")
        ):
            yield from page_pairs(record.rec_headers.get_header("WARC-Target-URI"), record.content_stream().read())


def _pair(page: str, url: str, kind: str, text: str) -> Pair:
    return page, url, kind, "".join(text.split())


def page_pairs(page: str, body: bytes) -> Iterator[Pair]:
    """The pairs of a page by BeautifulSoup."""
    soup = BeautifulSoup(body, "lxml")
    named = soup.find("base", href=True)
    base = urljoin(page, str(named["href"])) if named else page
    title = soup.title.get_text() if soup.title else ""
    for image in soup.find_all("img"):
        if address := source_of(image):
            said = {"alt": image.get("alt"), "img_title": image.get("title"), "caption": caption_of(image)}
            yield from told(page, base, address, {**said, "title": title})
    heads = {str(tag.get("property") or tag.get("name")): tag.get("content") for tag in reversed(soup.find_all("meta"))}
    if heads.get("og:image"):
        for name in ("og:title", "og:description", "og:image:alt"):
            yield from told(page, base, str(heads["og:image"]), {"og": heads.get(name)})
        yield from told(page, base, str(heads["og:image"]), {"title": title})


def told(page: str, base: str, address: str, said: dict[str, object]) -> Iterator[Pair]:
    full = "data:" if address.startswith("data:") else urljoin(base, address)
    for kind, words in said.items():
        if isinstance(words, str) and words.strip():
            yield _pair(page, full, kind, words)


def source_of(image: Tag) -> str:
    tags = [image]
    if image.parent and image.parent.name == "picture":
        tags += image.parent.find_all("source", recursive=False)
    sizes = [offer for tag in tags for name in ("data-srcset", "srcset") for offer in offers(str(tag.get(name) or ""))]
    if sizes:
        return max(sizes)[1]
    return next((str(image[name]).strip() for name in (*LAZY, "src") if image.get(name)), "")


def offers(srcset: str) -> Iterator[tuple[float, str]]:
    for entry in srcset.split(", "):
        if words := entry.split():
            yield (float(words[1][:-1]) if len(words) > 1 else 1.0), words[0].rstrip(",")


def caption_of(image: Tag) -> str:
    for figure in image.find_parents("figure"):
        if caption := figure.find("figcaption"):
            return caption.get_text()
    return ""


def first_pages(path: Path, count: int) -> bytes:
    """The archive's first `count` HTML pages, as an archive of their own."""
    out = io.BytesIO()
    writer, left = WARCWriter(out, gzip=True), count
    with path.open("rb") as file:
        for record in ArchiveIterator(file):
            if record.rec_type == "response" and "html" in (record.http_headers.get_header("Content-Type") or ""):
                writer.write_record(record)
                if not (left := left - 1):
                    break
    return out.getvalue()


def seconds(extract: Callable[[bytes], Iterator[Pair]], data: bytes) -> float:
    start = time.process_time()
    for _ in extract(data):
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("warc", type=Path)
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    data = first_pages(given.warc, given.pages)
    found, expected = Counter(ours(data)), Counter(theirs(data))
    both = (found & expected).total()
    pages = Counter(fate for fate, _, _ in read_pages(io.BytesIO(data), LIMITS))
    print(json.dumps({"pages": pages, "found": found.total(), "expected": expected.total(), "both": both}))
    print(json.dumps({"recall": both / max(expected.total(), 1), "precision": both / max(found.total(), 1)}))
    for name, more in (("only ours", found - expected), ("only theirs", expected - found)):
        print(name, more.total(), Counter(kind for _, _, kind, _ in more.elements()))
        for pair in list(more)[:8]:
            print("   ", *(part[:100] for part in pair), sep=" | ")
    times = [(seconds(ours, data), seconds(theirs, data)) for _ in range(given.repeats)]
    ratios = [b / a for a, b in times]
    print(json.dumps({"ours_pages_per_s": [round(pages["ok"] / a) for a, _ in times]}))
    print(json.dumps({"theirs_pages_per_s": [round(pages["ok"] / b) for _, b in times]}))
    print(json.dumps({"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}))


if __name__ == "__main__":
    main()
