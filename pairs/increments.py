"""What increments are called, and which of them listings hide while some are being merged.

`0003` is one cut; `0000-0002` holds what three cuts held, so it sorts where they stood, no name ever returns, and a run
that is pinned to `0001` finds it. While `compact` merges, `compacting.json` says which: before the commit the merged
increment is hidden, after it those that it replaces, until they are deleted. `Store.files` and `Store.folders` ask
here, so every reader sees each pair once. Cost: two looks for that file per listing.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pairs.errors import PairmillError

if TYPE_CHECKING:
    from pairs.store import Store

MARK = "compacting.json"
BY_SOURCE = ("candidates",)
BY_GROUP = ("ledger", "tries", "pairs", "scores", "selections", "shards")
Mark = dict[str, Any]  # source, merged, members, committed


def span(name: str) -> tuple[int, int]:
    """The first and the last cut that an increment holds: (0, 2) for `0000-0002`."""
    first, _, last = name.partition("-")
    return int(first), int(last or first)


def joined(names: Sequence[str]) -> str:
    """What adjacent increments are called once they are one."""
    return f"{span(names[0])[0]:04d}-{span(names[-1])[1]:04d}"


def following(names: Iterable[str]) -> str:
    """What the increment after all of `names` is called."""
    return f"{max((span(name)[1] for name in names), default=-1) + 1:04d}"


def holding(names: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Those of `names` that hold the increments `wanted`, each once; one that none holds stays what it is."""

    def holder(name: str) -> str:
        if name in names:
            return name
        first, last = span(name)
        return next((n for n in names if span(n)[0] <= first and last <= span(n)[1]), name)

    return list(dict.fromkeys(map(holder, wanted)))


def exactly(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """As `holding`, and an error where these hold other cuts than `wanted`."""
    found = holding(names, wanted)
    if found != list(wanted) and _cuts(found) != _cuts(wanted):
        raise PairmillError(
            expected=f"increments that hold {', '.join(wanted)} and no others",
            found=f"{', '.join(found)}: `pairmill compact` merged them with later ones",
            remedy="run the recipe with --new: that run has all of them",
        )
    return found


def _cuts(names: Iterable[str]) -> set[int]:
    return {cut for name in names for cut in range(span(name)[0], span(name)[1] + 1)}


def read_mark(store: "Store") -> Mark | None:
    """What is being merged, None mostly."""
    try:
        return dict(json.loads(store.read(MARK)))
    except FileNotFoundError:
        return None


def hides(mark: Mark | None) -> Callable[[str], bool]:
    """Whether a path is of an increment that readers don't see."""
    if mark is None:
        return lambda _: False
    gone = mark["members"] if mark["committed"] else [mark["merged"]]
    return lambda path: owned(path, mark["source"], gone)


def owned(path: str, source: str, increments: Collection[str]) -> bool:
    """Whether the file at `path` is of one of the source's `increments`."""
    parts = path.split("/")
    if len(parts) < 4 or parts[-2] not in increments:
        return False
    by_source = parts[0] in BY_SOURCE and parts[-3] == source
    return by_source or (parts[0] in BY_GROUP and parts[-3].rpartition("-")[0] == source)


def settle(store: "Store") -> None:
    """Ends what a killed merge left: rolls it forward where it was committed, else takes it back. Call it under the
    lock (`Workspace.lock` does)."""
    mark = read_mark(store)
    if mark is None:
        return
    gone = hides(mark)
    folders = {path.rpartition("/")[0] for kind in (*BY_SOURCE, *BY_GROUP) for path in store.every(kind) if gone(path)}
    for folder in sorted(folders):
        store.delete(folder, recursive=True)
    store.delete(MARK)
