"""`ls`, `status`, `verify` and `trace` on a finished run: what they say is what lies there."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from filters.engine import plan, score_shards
from pairs.shard import list_shards
from pairs.workspace import Workspace
from pipelines.inspection import trace
from tests.filters.shards import write_shards
from tests.filters.test_engine import Length
from tests.pipelines import flow
from tests.pipelines.conftest import Finished

pytestmark = pytest.mark.timeout(400)
Say = Callable[..., flow.Told]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return lambda *arguments: flow.command(capsys, *map(str, arguments))


def rows(finished: Finished) -> dict[str, dict[str, Any]]:
    """The web's pairs by their text."""
    store = finished.run.workspace.store
    tables = [store.read_table(ref.table) for ref in list_shards(store, "pairs") if ref.group.startswith("web-")]
    return {row["text"]: row for table in tables for row in table.to_pylist()}


def selected(finished: Finished) -> dict[str, dict[str, Any]]:
    """The round's verdicts by uid."""
    store, folder = finished.run.workspace.store, finished.report["rounds"][0]["selection"]
    return {row["uid"]: row for path in store.files(folder, ".parquet") for row in store.read_table(path).to_pylist()}


def test_ls_counts_what_is_there(finished: Finished, say: Say) -> None:
    told = say("ls", finished.workspace, "--json")
    assert told.code == 0 and told.err == ""
    facts = told.json
    assert {name: f["increments"] for name, f in facts["sources"].items()} == {"trusted": ["0000"], "web": ["0000"]}
    web, trusted = (next(f for g, f in facts["pairs"].items() if g.startswith(name)) for name in ("web-", "trusted-"))
    assert web == {"shards": 2, "rows": flow.WEB + 6} and trusted == {"shards": 2, "rows": flow.TRUSTED}
    assert len(facts["models"]) == 5 and facts["runs"] == [finished.run.folder.split("/")[1]]
    plain = say("ls", finished.workspace)
    assert plain.code == 0 and facts["runs"][0] in plain.out


def test_status_lists_the_stages(finished: Finished, say: Say) -> None:
    told = say("status", finished.workspace, "--json")
    (run,) = told.json
    assert told.code == 0 and run["next"].startswith("done") and "report.html" in run["next"]
    assert list(run["stages"])[:3] == ["crawl", "fetch", "first-filter"] and list(run["stages"])[-1] == "report"
    assert {facts["state"] for facts in run["stages"].values()} == {"done"}
    assert "round-1/pretrain" in say("status", finished.workspace).out


def test_verify_finds_all_as_recorded(finished: Finished, say: Say) -> None:
    told = say("verify", finished.workspace, "--json")
    assert told.code == 0, told.json["problems"]
    checked = told.json["checked"]
    assert checked["candidates"] == flow.WEB + len(flow.TEXTS) + flow.TRUSTED and checked["models"] == 5
    assert "all is as recorded" in say("verify", finished.workspace).out


@pytest.mark.parametrize("kind", ["pairs/web-*/*/*.tar", "shards/*/*/*/*.tar", "models/*/open_clip_model.safetensors"])
def test_verify_names_a_file_with_a_flipped_byte(finished: Finished, tmp_path: Path, say: Say, kind: str) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    victim = sorted(path for path in space.glob(kind) if path.stat().st_size > 2000)[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    told = say("verify", space, "--json")
    named = str(victim.relative_to(space))
    named = named.rpartition("/")[0] if kind.startswith("models") else named.removesuffix(".tar") + ".parquet"
    assert told.code == 2 and not told.json["ok"]
    assert {problem["path"] for problem in told.json["problems"]} == {named}
    plain = say("verify", space)
    assert plain.code == 2 and "WRONG" in plain.out and "Traceback" not in plain.out + plain.err


def test_trace_tells_the_whole_way_of_a_kept_pair(finished: Finished, say: Say) -> None:
    verdicts = selected(finished)
    row = next(r for t, r in sorted(rows(finished).items()) if verdicts[r["uid"]]["kept"])
    told = say("trace", row["uid"][:12], "--workspace", finished.workspace, "--json")
    facts = told.json
    assert told.code == 0 and facts["uid"] == row["uid"]
    (candidate,), (fetched,) = facts["candidate"], facts["fetch"]
    assert candidate["page"].endswith("/index.html") and candidate["texts"][0]["text"] == row["text"]
    assert fetched["status"] == "ok" and fetched["uid"] == row["uid"] and fetched["http_status"] == 200
    assert facts["pair"]["url"] == row["url"]
    scores = {name.rsplit("-", 1)[0]: values for name, values in facts["scores"].items()}
    assert {"image_stats", "text_stats", "clip", "blip_caption", "blip_match", "exact_duplicates"} <= set(scores)
    assert scores["text_stats"]["words"] == len(row["text"].split()) and -1 <= scores["clip"]["cosine"] <= 1
    (verdict,) = [v for name, v in facts["selections"].items() if name.startswith("tiny-")]
    assert verdict["kept"] and verdict["dropped_by"] is None and row["text"] in [t["text"] for t in verdict["texts"]]
    (training,) = facts["training"]
    assert "/round-1/" in training["training"] and training["steps"] and max(training["steps"]) < 6
    assert training["model"] == finished.report["rounds"][0]["training"]["model"]
    plain = say("trace", row["uid"], "--workspace", finished.workspace)
    assert plain.code == 0 and all(name in plain.out for name in ("candidate", "fetch", "scores", "training"))


def test_trace_tells_why_a_pair_was_dropped(finished: Finished, say: Say) -> None:
    uid = rows(finished)["box"]["uid"]
    facts = say("trace", uid, "--workspace", finished.workspace, "--json").json
    (verdict,) = [v for name, v in facts["selections"].items() if name.startswith("tiny-")]
    assert not verdict["kept"] and verdict["dropped_by"] == "text_stats.words min 2.0"
    assert facts["training"] == []


def test_trace_names_no_steps_once_a_pair_of_the_training_is_forgotten(
    finished: Finished, tmp_path: Path, say: Say
) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    kept = [uid for uid, verdict in selected(finished).items() if verdict["kept"]]
    trained = (uid for uid in kept if say("trace", uid, "--workspace", space, "--json").json["training"])
    one, other = next(trained), next(trained)
    dropped = rows(finished)["box"]["uid"]
    Workspace.open(space).bury("uid", [other], "asked for")
    told = say("trace", one, "--workspace", space, "--json").json["training"]
    assert [(t["steps"], "1 of its pairs were forgotten" in t["note"]) for t in told][-1] == ([], True)
    refused = say("trace", other, "--workspace", space, "--json")
    assert refused.code == 2 and "forg" in refused.err and not refused.out
    assert say("trace", dropped, "--workspace", space, "--json").json["training"] == []


def test_every_step_of_every_training_is_accounted_for(finished: Finished, say: Say) -> None:
    """Six steps of sixteen pairs are 96 places; the traces of all trained pairs name each of them."""
    places = []
    for uid in [uid for uid, verdict in selected(finished).items() if verdict["kept"]]:
        facts = say("trace", uid, "--workspace", finished.workspace, "--json").json
        places += [s for t in facts["training"] if "/round-1/" in t["training"] for s in t["steps"]]
    assert sorted(places) == sorted(list(range(6)) * 16)


def test_nothing_a_stranger_wrote_commands_the_terminal(finished: Finished, say: Say) -> None:
    uid = rows(finished)[flow.TERMINAL]["uid"]
    told = say("trace", uid, "--workspace", finished.workspace)
    assert told.code == 0
    assert not [c for c in told.out if not c.isprintable() and c != "\n"]
    assert "[bold]of[/bold]" in told.out, "markup is shown, not obeyed"
    assert json.loads(say("trace", uid, "--workspace", finished.workspace, "--json").out)["pair"]["text"]


@pytest.mark.parametrize("uid", ["ffff" * 8, "", "zz%", "[bold]"])
def test_an_unknown_uid_is_told(finished: Finished, say: Say, uid: str) -> None:
    answer = say("trace", uid, "--workspace", finished.workspace)
    assert answer.code == 2 and "expected one pair" in answer.err and repr(uid) in answer.err
    assert "Traceback" not in answer.err


def test_a_uid_that_begins_two_pairs_is_told(finished: Finished, say: Say) -> None:
    uids = sorted(row["uid"] for row in rows(finished).values())
    first = next(a[0] for a, b in itertools.pairwise(uids) if a[0] == b[0])
    answer = say("trace", first, "--workspace", finished.workspace)
    assert answer.code == 2 and "more digits" in answer.err


def test_trace_tells_why_a_filter_has_no_score(workspace: Workspace) -> None:
    (ref,) = write_shards(workspace.store, (8,))
    score_shards(workspace.store, plan({"length": Length(bad=4)}), [ref], engine="inline", workers=1)
    uids = workspace.store.read_table(ref.table)["uid"].to_pylist()
    (bad,), (good,) = (trace(workspace, uids[row])["scores"].values() for row in (5, 0))
    assert bad == {"uid": uids[5], "n": None, "error": "ValueError: this text can't be read"}
    assert good == {"uid": uids[0], "n": 26}
