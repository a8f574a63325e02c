"""Real pairs as a small website: the stamps of Debian's `tuxpaint-stamps-default` (photographs and drawings with
English captions, GPL-2), on ordinary HTML pages, served on loopback. `recipes/pretrain.yaml` crawls it.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb workspace/stamps-package
    python benchmarks/stamps_web.py workspace/stamps-package workspace/stamps-web --serve

Half of the stamps (by hash of their path) stand below /trusted/ and play the human-annotated set, the others below
/web/. On even pages a caption is the image's `alt`, on odd ones a `<figcaption>`. Nothing is changed about the pairs.
"""

import argparse
import functools
import html
import http.server
import shutil
from pathlib import Path

from pairs.identity import unit_hash

PORT = 8770
ON_A_PAGE = 25


def stamps(package: Path) -> list[tuple[Path, str]]:
    """(PNG, English caption) of each stamp that has one; the caption is the first line of its .txt."""
    root = package / "usr/share/tuxpaint/stamps"
    found = []
    for image in sorted(root.rglob("*.png")):
        text = image.with_suffix(".txt")
        lines = text.read_text(errors="replace").splitlines() if text.exists() else []
        if lines and lines[0].strip():
            found.append((image, lines[0].strip()))
    return found


def write_site(package: Path, site: Path) -> dict[str, int]:
    """Writes /web/ and /trusted/ with their pages; returns how many stamps each has."""
    root = package / "usr/share/tuxpaint/stamps"
    halves: dict[str, list[tuple[str, str]]] = {"web": [], "trusted": []}
    for image, caption in stamps(package):
        half = "trusted" if unit_hash("stamps", image.relative_to(root)) < 0.5 else "web"
        name = image.relative_to(root).as_posix().replace("/", "-")
        (site / half / "images").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, site / half / "images" / name)
        halves[half].append((name, caption))
    for half, pairs in halves.items():
        _write_pages(site / half, pairs)
    return {half: len(pairs) for half, pairs in halves.items()}


def _write_pages(folder: Path, pairs: list[tuple[str, str]]) -> None:
    blocks = [pairs[i : i + ON_A_PAGE] for i in range(0, len(pairs), ON_A_PAGE)]
    links = "".join(f'<li><a href="page{i}.html">page {i}</a></li>' for i in range(len(blocks)))
    (folder / "index.html").write_text(_page("Stamps", f"<ul>{links}</ul>"))
    for number, block in enumerate(blocks):
        items = "\n".join(_item(name, caption, as_alt=number % 2 == 0) for name, caption in block)
        (folder / f"page{number}.html").write_text(_page(f"Stamps, page {number}", items))


def _item(name: str, caption: str, as_alt: bool) -> str:
    if as_alt:
        return f'<p><img src="images/{name}" alt="{html.escape(caption)}"></p>'
    return f'<figure><img src="images/{name}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked Debian package")
    parser.add_argument("site", type=Path, help="where the site is written")
    parser.add_argument("--serve", action="store_true", help=f"serve it on 127.0.0.1:{PORT} until interrupted")
    arguments = parser.parse_args()
    print(write_site(arguments.package, arguments.site))
    if arguments.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(arguments.site))
        http.server.ThreadingHTTPServer(("127.0.0.1", PORT), handler).serve_forever()


if __name__ == "__main__":
    main()
