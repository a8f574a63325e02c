"""Where a CLIP's or a BLIP's weights lie, what their content hashes to, and whether they changed, without loading
torch: a run with nothing to score asks only this.

A name that nobody knows, a folder without weights and a hub that can't be reached are errors here, before anything
runs: open_clip itself would go on with random weights after a warning.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.strict import nearest

SEED = 0  # of random weights
CLIP_CONFIG = "open_clip_config.json"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
TOKENIZER_FILES += ["added_tokens.json"]  # beside vocab.txt
BLIP_FILES = [  # what is read of a BLIP's folder, and the card of one that we trained: all that stands for it
    "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
    "model_card.json", *TOKENIZER_FILES,
]  # fmt: skip

PUBLISHED = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME[@REVISION]

Stamp = tuple[tuple[str, int, int], ...]


def stamp(path: Path | None) -> Stamp:
    """Changes when the weights do, without reading them: names, sizes and times of the files."""
    files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def clip_hashes(model: str, weights: str | None) -> dict[str, str]:
    """What stands for the settings `model` and `weights` of a CLIP in a fingerprint."""
    path = clip_path(model, weights)
    if path is None:
        return {"model": _clip_config(model), "weights": f"random {SEED}, torch {version('torch')}"}
    return {"model": "its folder's" if path.is_dir() else _clip_config(model), "weights": content_hash(path)}


def clip_path(model: str, weights: str | None) -> Path | None:
    """The folder or file that holds a CLIP's weights; None for random ones."""
    if weights is not None and ("/" in weights or Path(weights).is_dir()):
        return _clip_folder(weights)
    _check_clip(model)
    return None if weights is None else _clip_tag(model, weights)


def _clip_folder(weights: str) -> Path:
    names = _names(Path(weights))
    if CLIP_CONFIG not in names or not any(name.endswith((".safetensors", ".bin", ".pt")) for name in names):
        raise PairmillError(
            expected=f"a folder with {CLIP_CONFIG} and its weights at {weights}",
            found=", ".join(names) or ("an empty folder" if Path(weights).is_dir() else "no such folder"),
            remedy="name a folder in open_clip's local format, or a tag such as laion2b_s34b_b79k",
        )
    return Path(weights).resolve()


def check_clip(model: str, weights: str | None) -> None:
    """Raises PairmillError where there is no such model, tag or folder; no hub is asked."""
    if weights is None or "/" in weights or Path(weights).is_dir():
        clip_path(model, weights)
        return
    _check_clip(model)
    if _tag_config(model, weights).get("hf_hub") and _offline():
        _clip_tag(model, weights)


def _tag_config(model: str, weights: str) -> dict[str, Any]:
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(model)
    config = pretrained.get_pretrained_cfg(model, weights)
    if not config:
        raise PairmillError(
            expected=f"a tag of {model}, or a folder", found=repr(weights),
            remedy=nearest(weights, tags) if tags else "name a folder; this model has no published weights",
        )  # fmt: skip
    return dict(config)


@functools.cache
def _clip_tag(model: str, weights: str) -> Path:
    from open_clip import pretrained

    config = _tag_config(model, weights)
    return _fetched(f"the weights {weights} of {model}", lambda: pretrained.download_pretrained(config)).resolve()


def _check_clip(name: str) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise PairmillError(
            expected="a model that open_clip has", found=repr(name), remedy=nearest(name, open_clip.list_models())
        )


def _clip_config(name: str) -> str:
    from open_clip import get_model_config

    return json.dumps(get_model_config(name), sort_keys=True)


def blip_hashes(weights: str, architecture: str) -> dict[str, str]:
    """What stands for the setting `weights` of a BLIP in a fingerprint."""
    return {"weights": content_hash(blip_folder(weights, architecture), BLIP_FILES)}


def blip_folder(weights: str, *architectures: str) -> Path:
    """The folder of `weights`, which must hold a BLIP of one of these classes with its tokenizer: the folder itself,
    or a published name with its revision ("Salesforce/blip-itm-base-coco@<commit>")."""
    if weights == "previous":
        raise PairmillError(
            expected="a folder or a published name as `weights`",
            found="'previous', and there is no previous model",
            remedy="set `first_filter: {blip: {}}` in the recipe, so that one is trained on the trusted pairs",
        )
    folder = _blip_snapshot(weights) if _published(weights) else Path(weights)
    names = _names(folder)
    missing = [name for name in ("config.json", "model.safetensors") if name not in names]
    missing += [] if {"tokenizer.json", "vocab.txt"} & set(names) else ["tokenizer.json"]
    missing += (
        [] if {"processor_config.json", "preprocessor_config.json"} & set(names) else ["preprocessor_config.json"]
    )
    made = [] if missing else _architectures(folder / "config.json")
    missing += ["settings in config.json"] if made is None else []
    pickled = "model.safetensors" in missing and any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    advice = "no pickle is read: load it where you trust it and save_pretrained it as safetensors, or "
    if made is None or missing or not {*architectures} & {*made}:
        raise PairmillError(
            expected=f"a {' or '.join(architectures)} with its tokenizer, as save_pretrained leaves it, in {weights}",
            found=(f"no {', '.join(missing)}" if missing else f"a model of {made}")
            + " (no such folder; a published name is OWNER/NAME or OWNER/NAME@REVISION)" * (not folder.is_dir()),
            remedy=advice * pickled
            + "name the folder of a trained captioner for blip_caption, of a matcher for blip_match",
        )
    return folder.resolve()


def check_blip(weights: str, architecture: str) -> None:
    """Raises PairmillError as `blip_folder` does, but where only a hub could tell."""
    if not _published(weights) or _offline():
        blip_folder(weights, architecture)


def _published(weights: str) -> bool:
    """Whether weights are those of a hub. Where OWNER is a folder here, they are only if they lie in the cache."""
    if not PUBLISHED.fullmatch(weights) or os.path.isdir(weights):
        return False
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = weights.partition("@")
    cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return isinstance(cached, str) or not Path(name).parent.is_dir()


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _architectures(config: Path) -> list[str] | None:
    try:
        return [str(name) for name in json.loads(config.read_bytes()).get("architectures") or []]
    except (ValueError, AttributeError, TypeError):  # no JSON, or none of this form
        return None


@functools.cache
def _blip_snapshot(weights: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = weights.partition("@")
    fetch = functools.partial(snapshot_download, name, revision=revision or None, allow_patterns=BLIP_FILES)
    return _fetched(f"the folder or published BLIP {weights}", fetch)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _fetched(told: str, fetch: Callable[[], str]) -> Path:
    """What `fetch` brings from a hub or its cache."""
    try:
        return Path(fetch())
    except Exception as error:
        raise PairmillError(
            expected=f"{told}, in the local cache or from their hub",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="check the name; where no hub can be reached, copy the cache or set `weights` to a local folder",
        ) from error
