"""Rules of the house that a reader would otherwise have to say twice: the filters don't know what the demo web was
made from, every file says what it is for, and the lock files name no address.
"""

import ast
import itertools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("pairs", "cluster", "filters", "training", "pipelines")
GENERATOR = [ROOT / "pipelines" / "demo" / f"{name}.py" for name in ("texts", "languages", "scenes", "shapes")]
MEASURERS = sorted((ROOT / "filters").glob("*.py"))
IN_COMMON = 3  # as many words of one list in one list of the other are a copy


def word_lists(source: str) -> list[set[str]]:
    """The words of every list of strings in a source: tuples, lists, sets, keys and values of dicts, f-strings' and
    plain strings' own words of four letters or more. Docstrings are left out: they may speak of the same things."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            found.append(constants(node.elts))
        elif isinstance(node, ast.Dict):
            found += [constants([key for key in node.keys if key]), constants(node.values)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            found.append({word.lower() for word in re.findall(r"\w{4,}", node.value)})
    return [words for words in found if len(words) >= IN_COMMON]


def constants(nodes: list[ast.expr]) -> set[str]:
    """The strings among `nodes`, in lower case; nested tuples have their own turn."""
    return {node.value.lower() for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def in_common(one: str, other: str) -> list[set[str]]:
    """What lists of the one source share with lists of the other, where it is more than chance."""
    pairs = itertools.product(word_lists(one), word_lists(other))
    return [shared for a, b in pairs if len(shared := a & b) >= IN_COMMON]


@pytest.mark.parametrize("generator", GENERATOR, ids=lambda path: path.stem)
def test_the_filters_know_nothing_of_what_the_demo_web_is_made_of(generator: Path) -> None:
    """A filter that knew the generator's words would be measured on its memory instead of on its judgement."""
    for measurer in MEASURERS:
        assert in_common(generator.read_text(), measurer.read_text()) == [], f"{generator.name} and {measurer.name}"


@pytest.mark.parametrize("generator", GENERATOR, ids=lambda path: path.stem)
def test_a_copied_list_would_be_seen(generator: Path) -> None:
    lists = [words for words in word_lists(generator.read_text()) if len(words) > IN_COMMON]
    assert lists, "there is something to copy"
    for words in lists:
        some = sorted(words)[:IN_COMMON]
        copies = [f"KNOWN = {tuple(some)!r}", f"KNOWN = {dict.fromkeys(some, 1)!r}", f"KNOWN = frozenset({some!r})"]
        for copied in copies:
            assert in_common(generator.read_text(), copied), copied


def test_filters_and_generator_import_nothing_of_each_other() -> None:
    assert not [path for path in MEASURERS if "pipelines" in path.read_text().replace("pipelines/", "")]
    assert not [path for path in (ROOT / "pipelines" / "demo").glob("*.py") if "from filters" in path.read_text()]


@pytest.mark.parametrize("folder", [*FLOORS, "benchmarks", "tests"])
def test_every_source_says_what_it_is_for(folder: str) -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}
    silent = [str(path.relative_to(ROOT)) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert trees and silent == []


def test_lock_files_name_no_address() -> None:
    locks = sorted(ROOT.glob("*.lock"))
    assert len(locks) >= 2
    for lock in locks:
        text = lock.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text, lock.name
        pinned = [line for line in text.splitlines() if re.match(r"^[A-Za-z0-9]", line)]
        assert pinned and all("==" in line for line in pinned), lock.name
        assert text.count("--hash=sha256:") >= len(pinned), lock.name


def test_no_source_loads_pickles_or_trusts_remote_code() -> None:
    ours_alone = {ROOT / "cluster" / "compute.py"}  # asks whether a function can travel to our own workers
    ours_alone |= {ROOT / "filters" / "text_toxicity.py"}  # reads a package's own two files, of pinned content alone
    for path in sorted({path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")} - ours_alone):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
                assert not (node.arg == "weights_only" and getattr(node.value, "value", None) is False), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                assert not {"pickle", "dill", "cloudpickle", "shelve", "joblib"} & set(names), path


def test_the_entry_point_is_the_one_that_sets_exit_codes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"pairmill": "pipelines.cli:main"}
