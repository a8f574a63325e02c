"""The demo web is what its truth says: the bytes, the rates, the defects, the server."""

import gzip
import hashlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from pairs.errors import PairmillError
from pairs.identity import url_key
from pipelines.demo import defects, texts
from pipelines.demo.plan import ALL_HOSTS, SLOW_HOST, plan, stream
from pipelines.demo.scenes import COLOURS, KINDS, SIZES, relation_of, render, sample
from pipelines.demo.server import running_server
from pipelines.demo.web import WebFacts, make_web

NOISE, SCENES = 0.3, 160


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.11", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> WebFacts:
    root = tmp_path_factory.mktemp("demo") / "web"
    return make_web(root, 7, NOISE, scenes=SCENES, trusted=12, port=free_port(), per_class=1)


@pytest.fixture(scope="module")
def rows(facts: WebFacts) -> list[dict]:
    return pq.read_table(facts.directory / "truth" / "truth.parquet").to_pylist()


@pytest.fixture(scope="module")
def server(facts: WebFacts) -> Iterator[str]:
    with running_server(facts.directory) as url:
        yield url


def get(url: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """One request without following anything: status, headers in lower case, body."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(method, f"/{path}", headers={"User-Agent": "test"})
    response = connection.getresponse()
    answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return answer


def with_defect(rows: list[dict], defect: str) -> list[dict]:
    found = [row for row in rows if row["defects"] == [defect]]
    assert found, defect
    return found


def hashes(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in ("access.jsonl", "server.log"))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_arguments_same_bytes(facts: WebFacts, tmp_path: Path) -> None:
    again = make_web(tmp_path / "web", 7, NOISE, scenes=SCENES, trusted=12, port=facts.port, per_class=1)
    assert hashes(again.directory) == hashes(facts.directory)
    other = [slot.scene for slot in plan(8, NOISE, SCENES, clean=False)]
    assert other != [slot.scene for slot in plan(7, NOISE, SCENES, clean=False)]


def test_a_finished_web_is_reused_and_never_mixed(facts: WebFacts, tmp_path: Path) -> None:
    before = (facts.directory / "routes.json").stat().st_mtime_ns
    same = make_web(facts.directory, 7, NOISE, scenes=SCENES, trusted=12, port=facts.port, per_class=1)
    assert same == facts and (facts.directory / "routes.json").stat().st_mtime_ns == before
    with pytest.raises(PairmillError, match="another directory"):
        make_web(facts.directory, 8, NOISE, scenes=SCENES, trusted=12, port=facts.port, per_class=1)
    for noise, scenes in ((0.95, 400), (0.3, 20)):
        with pytest.raises(PairmillError):
            make_web(tmp_path / "none", 1, noise, scenes=scenes, trusted=1)
    assert not list(tmp_path.iterdir())


def test_realised_rates(facts: WebFacts, rows: list[dict]) -> None:
    for name, planned in facts.planned.items():
        found = sum(row["defects"] == [name] for row in rows)
        base = sum(row["defects"] in ([], ["swapped"]) for row in rows) if name == "swapped" else SCENES
        assert found / base == facts.realised[name]
        assert abs(found - planned * base) <= 0.51, name
    assert len({row["url_key"] for row in rows}) == len(rows) == facts.images
    assert all(row["url_key"] == url_key(row["url"]) for row in rows)


def test_clean_web_has_no_defect(tmp_path: Path) -> None:
    facts = make_web(tmp_path / "web", 1, 0.0, scenes=40, trusted=1, clean=True, per_class=1)
    rows = pq.read_table(facts.directory / "truth" / "truth.parquet").to_pylist()
    assert len(rows) == 40 and not any(row["defects"] for row in rows)
    assert not json.loads((facts.directory / "routes.json").read_text())["routes"]
    assert "Disallow: /" not in (facts.directory / "www" / "127.0.0.11" / "robots.txt").read_text()


def stated(text: str) -> tuple[set[str], set[str]]:
    """The colours and kinds that the words of a text name."""
    words = set(text.lower().replace(",", " ").replace("!", " ").split())
    return words & set(COLOURS), words & set(KINDS)


def shown_in(row: dict) -> tuple[set[str], set[str]]:
    things = json.loads(row["facts"])["things"]
    return {t["colour"] for t in things}, {t["kind"] for t in things}


def test_swapped_texts_disagree_and_others_agree(rows: list[dict]) -> None:
    for row in rows:
        colours, kinds = shown_in(row)
        for text in filter(None, (row["alt"], row["caption"])):
            said_colours, said_kinds = stated(text)
            said_pairs = set(re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(KINDS)})", text.lower()))
            pairs = {(t["colour"], t["kind"]) for t in json.loads(row["facts"])["things"]}
            true = said_colours <= colours and said_kinds <= kinds and said_pairs <= pairs
            assert true != (row["defects"] == ["swapped"]), (text, row["facts"])
            assert row["text_from"] != row["url"]
    ordinary = [row for row in rows if not row["defects"]]
    assert all(stated(row["shown_text"])[1] for row in ordinary)


def test_captions_state_the_scene() -> None:
    words = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
    for i in range(200):
        rng = np.random.default_rng(i)
        scene = sample(rng)
        text = texts.careful(rng, scene).text
        assert stated(text) == ({t.colour for t in scene.things}, {t.kind for t in scene.things})
        assert texts.agrees(texts.loose(rng, scene), scene)
        for word, relation in words.items():
            if f" {word} " in f" {text} ":
                a, b = scene.things[:2]
                first, second = (a, b) if text.index(a.kind) < text.index(b.kind) else (b, a)
                assert relation_of(first, second) == relation


def test_scene_is_what_its_facts_say() -> None:
    for i in range(40):
        scene = sample(np.random.default_rng(i))
        picture = render(scene).astype(int)
        shorter = min(scene.width, scene.height)
        assert picture.shape == (scene.height, scene.width, 3) and 96 <= shorter <= 400
        assert 0.49 <= scene.width / scene.height <= 2.02
        for thing in scene.things:
            low, high = SIZES[thing.size]
            assert low <= thing.extent / shorter <= high
            far = np.abs(picture - np.array(thing.rgb)).max(axis=2) < 12
            ys, xs = np.nonzero(far)
            near = np.maximum(abs(xs - thing.x), abs(ys - thing.y)) < 0.6 * thing.extent
            assert near.mean() > 0.9 and near.sum() > 0.05 * thing.extent**2, thing


def test_foreign_texts(rows: list[dict]) -> None:
    for row in with_defect(rows, "foreign"):
        assert row["language"] in ("de", "fr", "es", "it", "nl") and not stated(row["shown_text"])[1]
    rng = np.random.default_rng(0)
    things = {(t.kind, t.colour) for i in range(400) for t in sample(stream(1, "scene", i)).things}
    assert len(things) == len(KINDS) * len(COLOURS)
    assert all(texts.foreign(rng, sample(rng)).text for _ in range(100))


def test_every_image_answers_as_its_truth_says(server: str, rows: list[dict]) -> None:
    odd = ("not_found", "redirect", "redirect_loop", "redirect_private", "drip", "slow")
    for row in [row for row in rows if (row["defects"] or [""])[0] not in odd][::3]:
        status, _, body = get(row["url"])
        assert status == 200 and hashlib.sha256(body).hexdigest() == row["sha256"], row


def test_images_open_except_the_damaged(server: str, rows: list[dict]) -> None:
    for row in [row for row in rows if not row["defects"]][:40]:
        _, headers, body = get(row["url"])
        image = Image.open(io.BytesIO(body))
        image.load()
        assert image.size == (row["width"], row["height"]) and headers["content-type"] == Image.MIME[image.format]
    for row in with_defect(rows, "broken"):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(get(row["url"])[2]))
    for row in with_defect(rows, "truncated"):
        with pytest.raises((OSError, SyntaxError)):
            Image.open(io.BytesIO(get(row["url"])[2])).load()
    for row in with_defect(rows, "tiny_icon"):
        assert max(Image.open(io.BytesIO(get(row["url"])[2])).size) <= 32


def test_copies_are_copies(server: str, rows: list[dict]) -> None:
    by_url = {row["url"]: row for row in rows}

    def small(url: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(get(url)[2])).convert("L").resize((16, 16), Image.Resampling.BOX), int)

    for row in with_defect(rows, "exact_duplicate"):
        assert (
            row["sha256"] == by_url[row["duplicate_of"]]["sha256"]
            and row["host"] != by_url[row["duplicate_of"]]["host"]
        )
    for row in with_defect(rows, "near_duplicate"):
        assert (
            row["sha256"] != by_url[row["duplicate_of"]]["sha256"]
            and row["facts"] == by_url[row["duplicate_of"]]["facts"]
        )
        assert abs(small(row["url"]) - small(row["duplicate_of"])).mean() < 8
    originals = [row["duplicate_of"] for row in rows if row["duplicate_of"]]
    assert len(set(originals)) == len(originals) and not any(by_url[url]["defects"] for url in originals)


def test_redirects_and_missing(server: str, rows: list[dict]) -> None:
    for row in with_defect(rows, "not_found"):
        assert get(row["url"])[0] == 404
    for row in with_defect(rows, "redirect"):
        status, headers, _ = get(row["url"])
        assert status == 301 and hashlib.sha256(get(headers["location"])[2]).hexdigest() == row["sha256"]
    for row in with_defect(rows, "redirect_loop"):
        assert get(get(row["url"])[1]["location"])[1]["location"] == row["url"]
    for row in with_defect(rows, "redirect_private"):
        assert get(row["url"])[1]["location"].startswith("http://169.254.169.254/") and row["location"]


def test_opt_outs(server: str, rows: list[dict]) -> None:
    assert b"Disallow: /private/" in get(server + "robots.txt")[2]
    forbidden = with_defect(rows, "robots_forbidden")
    assert all("/private/" in row["url"] for row in forbidden)
    assert {"/private/" in page for row in forbidden for page in row["pages"]} == {True, False}
    for row in with_defect(rows, "noai_page"):
        assert all(b'<meta name="robots" content="noai">' in get(page)[2] for page in row["pages"])
    for row in with_defect(rows, "noai_header"):
        assert get(row["url"], "HEAD")[1]["x-robots-tag"] == "noai"


def test_traps(server: str, rows: list[dict]) -> None:
    _, _, body = get(with_defect(rows, "png_bomb")[0]["url"])
    width, height = int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big")
    assert (width, height) == (25_000, 25_000) and len(body) < 400_000
    _, headers, body = get(with_defect(rows, "gzip_bomb")[0]["url"])
    assert headers["content-encoding"] == "gzip" and len(body) < 2_000_000
    size = int.from_bytes(body[-4:], "little")
    assert size == defects.BODY_BOMB_BYTES >= 500 * len(body)
    assert zlib.decompressobj(31).decompress(body, 1000) == bytes(1000)
    with socket.create_connection(
        with_defect(rows, "drip")[0]["url"][7:].partition("/")[0].split(":"), timeout=5
    ) as tap:
        path = with_defect(rows, "drip")[0]["url"][7:].partition("/")[2]
        tap.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, first = (tap.recv(4096) + tap.recv(4096)).partition(b"\r\n\r\n")
        assert b"Content-Length: 600" in head and len(first) <= 2
    assert {row["host"] for row in with_defect(rows, "slow")} == {SLOW_HOST}


def test_small_bombs_are_valid() -> None:
    assert gzip.decompress(defects.gzip_bomb(2 << 20)) == bytes(2 << 20)
    image = Image.open(io.BytesIO(defects.png_bomb(300)))
    image.load()
    assert image.size == (300, 300) and not np.asarray(image).any()


def test_every_page_is_reached_by_links(server: str, rows: list[dict]) -> None:
    seen, queue = set(), [server]
    while queue:
        url = queue.pop()
        if url in seen or url.split("/")[2].startswith(SLOW_HOST):
            continue
        seen.add(url)
        status, _, body = get(url)
        assert status == 200, url
        base, root = url.rpartition("/")[0], "/".join(url.split("/")[:3])
        for href in re.findall(r'href="([^"]+)"', body.decode()):
            whole = href if href.startswith("http") else root + href if href.startswith("/") else f"{base}/{href}"
            queue.append(whole)
    pages = {page for row in rows for page in row["pages"] if SLOW_HOST not in page}
    assert pages <= seen and {url.split("/")[2].split(":")[0] for url in seen} == set(ALL_HOSTS) - {SLOW_HOST}


def test_truth_is_never_served(server: str, facts: WebFacts) -> None:
    up = ("truth/truth.parquet", "truth/", "../routes.json", "../../truth/rates.json", "..%2f..%2froutes.json")
    for path in (
        *up,
        "%2e%2e/%2e%2e/truth/truth.parquet",
        "//etc/passwd",
        "../127.0.0.12/index.html",
        "x" * 5000,
        "%00",
    ):
        assert get(server + path)[0] in (400, 404), path
    assert get(server, "POST")[0] == 405


def test_access_log_is_complete(server: str, facts: WebFacts, rows: list[dict]) -> None:
    log = facts.directory / "truth" / "access.jsonl"
    before = len(log.read_text().splitlines())
    asked = [("HEAD", row["url"]) for row in rows[:20] if row["host"] != SLOW_HOST] + [("GET", server + "nowhere?a=1")]
    statuses = [get(url, method)[0] for method, url in asked]
    lines = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert [(e["method"], f"http://{e['host']}:{facts.port}{e['path']}", e["status"]) for e in lines] == [
        (method, url, status) for (method, url), status in zip(asked, statuses, strict=True)
    ]
    assert all(e["agent"] == "test" and e["time"] > 1.6e9 for e in lines)


def test_server_ends_and_explains(facts: WebFacts, server: str, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="free"), running_server(facts.directory):
        pass
    with pytest.raises(PairmillError, match="demo-web"), running_server(tmp_path):
        pass
    port = free_port()
    with running_server(facts.directory, port) as url:
        assert url.endswith(f":{port}/") and get(url)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        get(url)


def test_server_dies_with_its_parent(facts: WebFacts) -> None:
    code = "import sys, time; from pathlib import Path; from pipelines.demo.server import running_server\n"
    code += "with running_server(Path(sys.argv[1]), int(sys.argv[2])) as url: print(url, flush=True); time.sleep(50)"
    command = [sys.executable, "-c", code, str(facts.directory), str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        assert get(url)[0] == 200
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            get(url)
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlived its parent")


def test_trusted_and_eval_are_clean(facts: WebFacts) -> None:
    pictures = sorted((facts.directory / "trusted").glob("*.jpg"))
    assert len(pictures) == facts.trusted == 12
    for i, path in enumerate(pictures):
        said = stated(path.with_suffix(".txt").read_text())
        scene = sample(stream(7, "trusted", i))
        assert said == ({t.colour for t in scene.things}, {t.kind for t in scene.things})
        assert Image.open(path).size == (scene.width, scene.height)
    folders = {path.name for path in (facts.directory / "eval").iterdir()}
    assert folders == set(facts.classes) and len(folders) == 80
