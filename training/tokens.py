"""Texts as CLIP tokens: each different text is tokenised once, with open_clip's tokenizer, offline.

A run meets few of the 49,408 tokens, and a row that no text holds gets no gradient and, without weight decay, never
moves. So training holds the rows it can meet (`used`), and the export puts them back among the others: the
same weights, without an all-reduce and an AdamW over millions of zeros.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pairs.errors import PairmillError

Ids = npt.NDArray[np.int64]
LONGEST = 100  # characters a token: what a tokenizer is given of an endless text


@dataclass(frozen=True)
class Tokens:
    """`ids[n]` are the numbers of text n's tokens in `used`, start and end marks included."""

    ids: list[Ids]
    used: Ids  # sorted ids of open_clip's vocabulary that any text holds
    truncated: int  # different texts that were longer than the context


class Tokeniser:
    """Numbers texts: two texts of the same tokens have the same number, as nothing downstream can tell them apart."""

    def __init__(self, context: int, tokenizer: str = "clip", bare: bool = False) -> None:
        self.context, self.truncated = context, 0
        self._encode = functools.partial(bert if bare else encode, context=context, tokenizer=tokenizer)
        self._by_text: dict[str, int] = {}
        self._by_tokens: dict[bytes, int] = {}
        self._ids: list[Ids] = []

    def number(self, text: str) -> int:
        found = self._by_text.get(text)
        if found is None:
            ids, cut = self._encode(text)
            self.truncated += cut
            found = self._by_tokens.setdefault(ids.tobytes(), len(self._ids))
            if found == len(self._ids):
                self._ids.append(ids)
            self._by_text[text] = found
        return found

    def tokens(self) -> Tokens:
        used = np.unique(np.concatenate(self._ids))
        return Tokens([np.searchsorted(used, ids) for ids in self._ids], used, self.truncated)


def encode(text: str, context: int, tokenizer: str = "clip") -> tuple[Ids, bool]:
    """The text's tokens, at most `context`, and whether it was cut. CLIP's stand between a start and an end mark;
    another tokenizer's (a Hugging Face name or folder) are always `context`, its padding included."""
    if tokenizer != "clip":
        other = _hugging_face(tokenizer, context)
        whole = other.tokenizer(other.clean_fn(text))["input_ids"]
        return other(text)[0].numpy().astype(np.int64), len(whole) > context
    clip = _tokenizer()
    ids = [clip.sot_token_id, *clip.encode(text), clip.eot_token_id]
    cut = len(ids) > context
    return np.array([*ids[: context - 1], ids[-1]] if cut else ids, dtype=np.int64), cut


def bert(text: str, context: int, tokenizer: str) -> tuple[Ids, bool]:
    """The text's tokens by a BERT tokenizer's folder, between its two marks and without padding, and whether it was
    cut: as transformers' BLIP reads texts."""
    ids = bert_tokenizer(tokenizer)(text[: LONGEST * context], verbose=False)["input_ids"]
    long = len(ids) > context
    ids = [*ids[: context - 1], ids[-1]] if long else ids
    return np.array(ids, dtype=np.int64), long or len(text) > LONGEST * context


@functools.cache
def bert_tokenizer(folder: str) -> Any:
    from transformers import BertTokenizerFast  # seconds

    try:
        return marked(BertTokenizerFast.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise PairmillError(
            expected="a BERT tokenizer in a folder (pretrain.model.tokenizer)",
            found=f"{folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name one, such as that of a BLIP's folder",
        ) from error


def marked(tokenizer: Any) -> Any:
    """The same BERT tokenizer with BLIP's marks, which a published BLIP's lacks: its model has rows for them."""
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def mark(tokenizer: Any, piece: str) -> int:
    """The number of a mark, which the tokenizer must know."""
    found = int(tokenizer.convert_tokens_to_ids(piece))
    if found == tokenizer.unk_token_id:
        raise PairmillError(
            expected=f"{piece} in the tokenizer, for pretrain.blip.match_mark",
            found=f"other marks: {', '.join(tokenizer.all_special_tokens)}",
            remedy="leave match_mark out, or take a tokenizer that has it (a plain BERT's is given it)",
        )
    return found


@functools.cache
def _hugging_face(name: str, context: int) -> Any:
    try:
        return _open_clip_tokenizer().HFTokenizer(name, context_length=context, clean="canonicalize")
    except (OSError, ValueError) as error:
        raise PairmillError(
            expected=f"a tokenizer at {name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name a folder that holds one, or `tokenizer: clip`",
        ) from error


@functools.cache
def _tokenizer() -> Any:
    return _open_clip_tokenizer().SimpleTokenizer()


def _open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer module by itself: importing the package takes seconds (timm, transformers)."""
    package = importlib.util.find_spec("open_clip")
    assert package and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("_open_clip_tokenizer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
