"""The command line. Every command says what it did, prints advice instead of a traceback for a user's mistake,
and exits with 0 only when the work is done (2: a mistake or a gate; 1: a bug of ours or a failure; 130: interrupted).
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as Rich

from pairs.errors import PairmillError
from pairs.recipe import Recipe, load_recipe
from pairs.workspace import Workspace
from pipelines.console import printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="From web pages to a pretrained vision-language model, and back into the next round's data filter.",
)
INTERRUPTED = 130
DEMO_PORT, DEMO_WEB = 8765, Path("workspace/demo-web")  # recipes/demo.yaml names them
_err = Rich(stderr=True, highlight=False)

RecipeArg = Annotated[Path, typer.Argument(help="A recipe: one YAML file that states one run (see recipes/).")]
SpaceArg = Annotated[str, typer.Argument(help="A workspace: a folder or an fsspec URL.")]
SpaceOpt = Annotated[str | None, typer.Option("--workspace", help="Where results lie. Default: workspace/<name>.")]
EngineOpt = Annotated[str | None, typer.Option("--engine", help="ray, or inline: this process alone, same results.")]
NewOpt = Annotated[bool, typer.Option("--new", help="Look for what is new in the sources: the next increment.")]
CalOpt = Annotated[bool, typer.Option("--recalibrate", help="Find thresholds anew instead of reusing pinned ones.")]
AdvOpt = Annotated[bool, typer.Option("--advance", help="With --new: train the scorer anew, don't keep the last.")]
LinesOpt = Annotated[Path | None, typer.Option(help="A file with one a line; - is stdin.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]


def _run(
    until: str,
    recipe: Path,
    workspace: str | None,
    engine: str | None,
    new: bool,
    cal: bool,
    js: bool,
    advance: bool = False,
) -> None:
    from pipelines import stages

    spec = _recipe(recipe, engine)
    stages.check(spec)  # a mistake in the recipe is told before anything is written or started
    root = workspace or f"workspace/{spec.name}"
    with _server(root, _load_flow):
        result = _load_flow()(str(recipe), root, engine, until, new, cal, js, advance)
    _tell(result, js)


def _recipe(path: Path, engine: str | None) -> Recipe:
    if engine not in (None, "ray", "inline"):
        raise PairmillError(expected="--engine ray or inline", found=engine, remedy="leave it out for the recipe's own")
    return load_recipe(path)


@contextlib.contextmanager
def _server(root: str, meanwhile: Callable[[], object], port: int | None = None) -> Iterator[tuple[Workspace, str]]:
    """The workspace `root` and Prefect's server in it, by its address. A second writer is told at once, before a server
    starts on the first one's database."""
    from pipelines.prefect_server import orchestration

    space = Workspace.open(root, create=True)
    home = (space.store.local or Path.home() / ".cache" / "pairmill") / "prefect"
    with space.lock():
        pass
    with orchestration(home, port, meanwhile) as url:
        yield space, url


def _load_flow() -> Callable[..., dict[str, Any]]:
    """The flow. Importing it takes 2 s, and only then is Prefect's address read."""
    from pipelines.flywheel import flywheel

    return flywheel


def _tell(result: dict[str, Any], js: bool) -> None:
    if js:
        print(json.dumps(result, default=str))
        return
    if result.get("reused"):
        _err.print(f"reused: {', '.join(result['reused'])}", markup=False)
    if result.get("report"):
        _err.print(f"report: {result['report']}", markup=False)


def _command(until: str, summary: str) -> None:
    def command(
        recipe: RecipeArg,
        workspace: SpaceOpt = None,
        engine: EngineOpt = None,
        new: NewOpt = False,
        recalibrate: CalOpt = False,
        advance: AdvOpt = False,
        json: JsonOpt = False,
    ) -> None:
        _run(until, recipe, workspace, engine, new, recalibrate, json, advance)

    app.command(name="run" if until == "all" else until, help=summary)(command)


_command("all", "Run a recipe: all its rounds, to the report. Whatever is done already is reused.")
_command("crawl", "Run a recipe up to its candidates (URLs with their texts).")
_command("fetch", "Run a recipe up to its pairs (images, in shards).")
_command("curate", "Run a recipe up to its first selection, with a report on it.")
_command("pretrain", "Run a recipe up to its trained and evaluated models; whatever upstream is missing comes first.")
_command("evaluate", "Run a recipe up to the evaluation of its models, and choose the next scorer.")
_command("report", "Run a recipe to its report, reusing what is done.")


@app.command()
def demo(
    workspace: SpaceOpt = None,
    seed: Annotated[int, typer.Option(help="Another seed draws another web.")] = 7,
    noise: Annotated[float, typer.Option(help="Share of ordinary pairs whose texts are swapped.")] = 0.3,
    recipe: Annotated[Path, typer.Option(help="The recipe that is run.")] = Path("recipes/demo.yaml"),
    engine: EngineOpt = None,
) -> None:
    """Draw the demo web, serve it on loopback, and run the whole flywheel on it."""
    from pipelines.demo.server import running_server
    from pipelines.demo.web import make_web

    root = workspace or f"workspace/{_recipe(recipe, engine).name}"
    with (
        _server(root, lambda: make_web(DEMO_WEB, seed=seed, noise=noise, port=DEMO_PORT)),
        running_server(DEMO_WEB, DEMO_PORT),
    ):
        _run("all", recipe, root, engine, False, False, False)


@app.command("demo-web")
def demo_web(
    directory: Annotated[Path, typer.Argument(help="Where the web is written.")],
    seed: Annotated[int, typer.Option()] = 7,
    noise: Annotated[float, typer.Option(help="Share of ordinary pairs whose texts are swapped, in [0, 1].")] = 0.3,
    scenes: Annotated[int, typer.Option(help="Scenes on the pages.")] = 2400,
    trusted: Annotated[int, typer.Option(help="Scenes of the trusted folder.")] = 1100,
    port: Annotated[int, typer.Option(help="Port that its links name.")] = 8765,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it until interrupted.")] = False,
) -> None:
    """Write a small web with known defects and its ground truth; with --serve, serve it on loopback."""
    from pipelines.demo.server import serve as serve_web
    from pipelines.demo.web import make_web

    if not directory.joinpath("www").exists():
        make_web(directory, seed=seed, noise=noise, scenes=scenes, trusted=trusted, port=port)
    _err.print(f"demo web in {directory}, seed page http://127.0.0.11:{port}/", markup=False)
    if serve:
        serve_web(directory, port)


@app.command("new-filter")
def new_filter(
    name: Annotated[str, typer.Argument(help="What it measures: small letters, digits and '_', such as text_stats.")],
) -> None:
    """Write a filter and its test, to be changed into your own.

    A filter measures pairs and writes columns; it drops nothing, rules in a recipe do. It is found by its file's name,
    and tests/filters/test_contract.py checks its mechanics without being told. docs/add-a-filter.md says more.
    """
    from pipelines.new_filter import hint, write_filter

    _err.print(hint(name, write_filter(name)), markup=False, soft_wrap=True)


@app.command()
def deploy(
    recipe: RecipeArg,
    workspace: SpaceOpt = None,
    cron: Annotated[str, typer.Option(help="When to run, as cron has it.")] = "0 3 * * *",
    port: Annotated[int, typer.Option(help="Port of the local orchestration server and its UI.")] = 4200,
) -> None:
    """Serve a schedule in the foreground: each run adds only what is new, and never overlaps another."""
    from pipelines import stages

    spec = load_recipe(recipe)
    stages.check(spec)
    root = workspace or f"workspace/{spec.name}"
    with _server(root, _load_flow, port) as (space, url):
        from pipelines.deployment import serve_schedule

        _err.print(f"schedule {cron!r} of {spec.name}; UI at {url.removesuffix('/api')}", markup=False)
        serve_schedule(recipe.resolve(), str(Path(root).resolve()) if space.store.local else root, spec.name, cron)


@app.command()
def verify(workspace: SpaceArg, json: JsonOpt = False) -> None:
    """Check every tar, table, offset, hash and count of a workspace, and name what is wrong."""
    from pipelines.inspection import tell_verdict

    raise typer.Exit(tell_verdict(Workspace.open(workspace), json))


@app.command()
def forget(
    workspace: SpaceArg,
    urls: LinesOpt = None,
    uids: LinesOpt = None,
    hosts: LinesOpt = None,
    sha256: LinesOpt = None,
    reason: Annotated[str, typer.Option(help="Noted with each tombstone.")] = "asked for",
    wait: Annotated[bool, typer.Option(help="Wait for a running writer; else the next one does the rewriting.")] = True,
    json: JsonOpt = False,
) -> None:
    """Forget pairs for good, in every file: by address, uid, host (with all below it) or sha256 of the image's bytes.
    Each option names a file with one a line, or - for stdin. Without any, what was asked before is finished."""
    from pipelines.takedown import forget as take_down
    from pipelines.takedown import tell

    files = {"urls": urls, "uids": uids, "hosts": hosts, "sha256": sha256}
    asked = {option: _lines(path) for option, path in files.items() if path is not None}
    space = Workspace.open(workspace)

    def waiting(holder: str) -> None:
        _err.print(f"forgotten from now on; waiting for {holder} to end, then files are rewritten", markup=False)

    tell(take_down(space, asked, reason, waiting if wait else None), json)


@app.command()
def compact(
    workspace: SpaceArg,
    source: Annotated[str | None, typer.Option(help="This source alone. Default: all.")] = None,
    below: Annotated[int | None, typer.Option(min=1, help="Pairs. Default: as many as fill a shard.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be merged; change nothing.")] = False,
    json: JsonOpt = False,
) -> None:
    """Merge small adjacent increments of a source into one, so that later stages read few large shards. Nothing is
    fetched, scored or trained again."""
    from pipelines.compact import compact as merge
    from pipelines.compact import tell

    tell(merge(Workspace.open(workspace), source, below, dry_run), json)


def _lines(path: Path) -> list[str]:
    """The lines of a file that aren't blank; `-` is stdin."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PairmillError(expected=f"a text file at {path}", found=str(error), remedy="correct the path") from None
    return [line for line in text.splitlines() if line.strip()]


@app.command("export-uids")
def export_uids(
    workspace: SpaceArg,
    selection: Annotated[str, typer.Argument(help="A selection's folder, or a recipe's name (its latest run's).")],
    file: Annotated[Path, typer.Argument(help="Where the list is written (.npy, type u8,u8, sorted).")],
    column: Annotated[str, typer.Option(help="source_uid (DataComp's own uids) or uid (ours).")] = "source_uid",
    source: Annotated[str | None, typer.Option(help="Only the pairs of this source.")] = None,
) -> None:
    """Write the uids of a selection's kept pairs as a DataComp list; `in_list` in a rule reads one."""
    from pipelines.uid_lists import export_uids as export

    told = export(Workspace.open(workspace), selection, file, column, source)
    lacking = f", {told.without} without a {column} left out" if told.without else ""
    _err.print(f"{told.uids} uids of {told.kept} kept pairs of {told.selection}{lacking}: {file}", markup=False)


@app.command()
def trace(
    uid: Annotated[str, typer.Argument(help="A pair's uid, or its first digits.")],
    workspace: Annotated[str, typer.Option("--workspace", help="The workspace to look in.")],
    json: JsonOpt = False,
) -> None:
    """Print a pair's whole way: page, texts, fetch, scores, rules, and the training steps that consumed it."""
    from pipelines.inspection import tell_trace

    tell_trace(Workspace.open(workspace), uid, json)


@app.command("ls")
def list_(workspace: SpaceArg, json: JsonOpt = False) -> None:
    """List what a workspace holds: sources, increments, shards, scores, selections, models, runs."""
    from pipelines.inspection import tell_contents

    tell_contents(Workspace.open(workspace), json)


@app.command()
def status(workspace: SpaceArg, json: JsonOpt = False) -> None:
    """Say what is done, what runs, what failed, and how to go on."""
    from pipelines.inspection import tell_status

    tell_status(Workspace.open(workspace), json)


def main() -> None:
    """The entry point of `pairmill`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        app()
    except PairmillError as error:
        _err.print(printable(f"pairmill: {error}"), markup=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes it of a KeyboardInterrupt, and says nothing
            _err.print("interrupted; the same command goes on where it stopped")
        raise


if __name__ == "__main__":
    main()
