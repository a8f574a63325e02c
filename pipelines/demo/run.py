"""`pairmill demo`: draws the demo web where the recipe expects it, serves it, and runs the recipe on it."""

from collections.abc import Callable
from pathlib import Path

from pairs.recipe import load_recipe
from pipelines.demo.server import running_server
from pipelines.demo.web import make_web

PORT = 8765
WEB = Path("workspace/demo-web")  # recipes/demo.yaml names its folders


def run_demo(recipe: Path, workspace: str | None, seed: int, noise: float, run: Callable[[str], None]) -> None:
    """Calls `run` with the workspace's root while the web is served."""
    name = load_recipe(recipe).name
    make_web(WEB, seed=seed, noise=noise, port=PORT)
    with running_server(WEB, PORT):
        run(workspace or f"workspace/{name}")
