"""`pairmill export-uids`: the kept pairs of a selection as a DataComp uid list, which DataComp's own tools resample by.

DataComp's uids are the source's own, kept in `source_uid`; a list of our uids (`--column uid`) serves another
workspace with the same pairs. A rule reads lists of both kinds: `{column: pairs.source_uid, in_list: medium.npy}`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pairs.errors import PairmillError
from pairs.store import Store
from pairs.strict import nearest
from pairs.uid_lists import halves, save_uid_list
from pairs.workspace import Workspace, alive

COLUMNS = ("source_uid", "uid")


@dataclass(frozen=True)
class Exported:
    """`kept` pairs gave `uids` different ones; `without` have no source uid and are in no list."""

    selection: str
    kept: int
    without: int
    uids: int


def export_uids(
    workspace: Workspace, selection: str, path: Path, column: str = "source_uid", source: str | None = None
) -> Exported:
    """Writes the list of `selection` (its folder's name, or the recipe's, for what its latest run selected last) to
    `path`."""
    if column not in COLUMNS:
        raise PairmillError(
            expected="a column of uids for --column", found=repr(column), remedy=nearest(column, [*COLUMNS])
        )
    folder, dead, kept = _folder(workspace, selection), workspace.tombstones(), 0
    columns = [pa.chunked_array([], pa.string())]
    for table_path in workspace.store.files(folder, ".parquet"):
        tail = table_path.removeprefix(f"{folder}/")
        if source is not None and tail.split("/")[0].rsplit("-", 1)[0] != source:
            continue
        pairs = workspace.store.read_table(f"pairs/{tail}", ["uid", "url_key", "status", "source_uid"])
        judged = workspace.store.read_table(table_path, ["kept"])["kept"]
        pairs = pairs.filter(judged).filter(alive(pairs.filter(judged), dead))
        kept += pairs.num_rows
        columns.append(pairs[column].cast(pa.string()).drop_null())
    found = pa.chunked_array([chunk for one in columns for chunk in one.chunks], pa.string())
    _refuse_others(found, kept, column, source)
    return Exported(folder, kept, kept - len(found), save_uid_list(path, [found]))


def _folder(workspace: Workspace, selection: str) -> str:
    """The folder of a finished selection, by its whole name or by the recipe's: of several the latest run's last."""
    store = workspace.store
    done = [name for name in store.folders("selections") if store.has(f"selections/{name}/manifest.json")]
    meant = [n for n in done if n == selection] or [n for n in done if n.rsplit("-", 1)[0] == selection]
    if len(meant) > 1 and (latest := _latest(store, selection)) in meant:
        meant = [latest]
    if len(meant) == 1:
        return f"selections/{meant[0]}"
    names = {*done, *(name.rsplit("-", 1)[0] for name in done)}
    raise PairmillError(
        expected=f"one finished selection named {selection!r}",
        found=", ".join(meant) or "none",
        remedy="give the whole name of one of them" if meant else nearest(selection, sorted(names)),
    )


def _latest(store: Store, recipe: str) -> str:
    """The selection of the last round of the recipe's run that began a stage last; empty where none has curated."""
    found = []
    for run in (f"runs/{name}" for name in store.folders("runs") if name.rsplit("-", 2)[0] == recipe):
        rounds = {int(p.split("/")[2].removeprefix("round-")): p for p in store.files(run, "/curation.json")}
        if rounds:
            stages = json.loads(store.read(f"{run}/stages.json"))
            found.append((max(facts["started"] for facts in stages.values()), rounds[max(rounds)]))
    return str(json.loads(store.read(max(found)[1]))["selection"].rpartition("/")[2]) if found else ""


def _refuse_others(found: pa.ChunkedArray, kept: int, column: str, source: str | None) -> None:
    known = halves(found)[2]
    if kept and not len(found):
        told = f"{kept} kept pairs without one"
    elif not known.all():
        told = f"{found[int(np.argmin(known))].as_py()!r} among {len(found)}"
    else:
        return
    raise PairmillError(
        expected=f"uids of 32 hex digits in {column}" + (f" of {source}" if source else ""),
        found=told,
        remedy="name the source that came from DataComp (--source), or export our own uids (--column uid)",
    )
