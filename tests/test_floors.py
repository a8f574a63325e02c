"""Imports point downwards only, and the orchestrators stay at the edge."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "pairs": set(),
    "cluster": {"pairs"},
    "filters": {"pairs", "cluster"},
    "training": {"pairs"},
    "pipelines": {"pairs", "cluster", "filters", "training"},
}
FLOW_FILES = {"pipelines/flywheel.py", "pipelines/deployment.py"}
FORBIDDEN_IN_TRAINING = {"ray", "prefect", "webdataset", "cluster", "filters"}

FILES = sorted(path.relative_to(ROOT) for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top names of every import in the file, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    floor, names = path.parts[0], imported(path)
    above = names & (set(MAY_IMPORT) - MAY_IMPORT[floor] - {floor})
    assert not above, f"{path} imports {above} from above or beside"
    assert "ray" not in names or floor == "cluster", f"{path} imports ray: map over shards with cluster.compute"
    assert floor != "training" or not names & FORBIDDEN_IN_TRAINING


def test_prefect_is_imported_by_flow_files_alone() -> None:
    assert {str(path) for path in FILES if "prefect" in imported(path)} <= FLOW_FILES


def test_every_file_opens_with_a_paragraph() -> None:
    trees = {path: ast.parse((ROOT / path).read_text()) for path in FILES}
    silent = [str(path) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []
