"""Where a CLIP's weights lie and what their content hashes to, without loading torch: a run with nothing to score asks
only this.

A name that open_clip doesn't know, a folder without weights and a hub that can't be reached are errors here, before
anything runs: open_clip itself would go on with random weights after a warning.
"""

import functools
import json
from importlib.metadata import version
from pathlib import Path

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.strict import nearest

SEED = 0  # of random weights
CONFIG = "open_clip_config.json"

Stamp = tuple[tuple[str, int, int], ...]


def content_hashes(model: str, weights: str | None) -> dict[str, str]:
    """What stands for the settings `model` and `weights` in a fingerprint."""
    path = weights_path(model, weights)
    if path is None:
        return {"model": _config(model), "weights": f"random {SEED}, torch {version('torch')}"}
    return {"model": "its folder's" if path.is_dir() else _config(model), "weights": content_hash(path)}


def weights_path(model: str, weights: str | None) -> Path | None:
    """The folder or file that holds the weights; None for random ones."""
    if weights is not None and ("/" in weights or Path(weights).is_dir()):
        return _folder(weights)
    _check_model(model)
    return None if weights is None else _tag(model, weights)


def stamp(path: Path | None) -> Stamp:
    """Changes when the weights do, without reading them: names, sizes and times of the files."""
    files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _folder(weights: str) -> Path:
    path = Path(weights)
    found = [p.name for p in path.iterdir()] if path.is_dir() else None
    if found is None or CONFIG not in found or not any(n.endswith((".safetensors", ".bin", ".pt")) for n in found):
        raise PairmillError(
            expected=f"a folder with {CONFIG} and its weights at {weights}",
            found="no such folder" if found is None else ", ".join(sorted(found)) or "an empty folder",
            remedy="name a folder in open_clip's local format, or a tag such as laion2b_s34b_b79k",
        )
    return path.resolve()


@functools.cache
def _tag(model: str, weights: str) -> Path:
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(model)
    config = pretrained.get_pretrained_cfg(model, weights)
    if not config:
        raise PairmillError(
            expected=f"a tag of {model}, or a folder", found=repr(weights),
            remedy=nearest(weights, tags) if tags else "name a folder; this model has no published weights",
        )  # fmt: skip
    try:
        return Path(pretrained.download_pretrained(config)).resolve()
    except Exception as error:
        raise PairmillError(
            expected=f"the weights {weights} of {model}, in the local cache or from their hub",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="fetch them where the hub can be reached and copy the cache, or set `weights` to a local folder",
        ) from error


def _check_model(name: str) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise PairmillError(
            expected="a model that open_clip has", found=repr(name), remedy=nearest(name, open_clip.list_models())
        )


def _config(name: str) -> str:
    from open_clip import get_model_config

    return json.dumps(get_model_config(name), sort_keys=True)
