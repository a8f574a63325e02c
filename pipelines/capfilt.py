"""A round that trains a BLIP (CapFilt): its tokenizer and start, and captioner and match filter, fine-tuned from it.

A training names the folders that it starts from by content, `models/<sha256>` in the workspace, so that no path enters
its fingerprint. Captioner and filter are fine-tuned apart: where they share their weights, a filter lets through what
the captioner gets wrong (Li et al., BLIP, arXiv 2201.12086).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filters.blip import CAPTIONS, MATCHES
from filters.lookup import load_filter
from filters.weights import BLIP_FILES, TOKENIZER_FILES, blip_folder
from pairs.errors import PairmillError
from pairs.pretrain import BEGINNING, PREVIOUS, MedSpec, PretrainSpec, fits, shape_of, text_positions
from pairs.recipe import Recipe
from pairs.strict import strict
from pipelines import curation, training_jobs
from pipelines.models import model_folder, publish_folder
from pipelines.run import Run
from training.tokens import bert_tokenizer, mark

Facts = dict[str, Any]
TRAINED_BY = {"blip_caption": "lm", "blip_match": "itm"}
LOSSES = {"captioner": ["lm"], "matcher": ["itc", "itm"]}
BIAS = "confirmation bias: the filter lets through what the captioner gets wrong"


def check(recipe: Recipe) -> None:
    """Tells what a BLIP of a recipe's rounds lacks, before anything runs."""
    spec = recipe.pretrain
    if recipe.finetune and not recipe.trusted:
        raise PairmillError(
            expected="a source with `trusted: true` to fine-tune captioner and match filter on",
            found=f"none among {', '.join(recipe.sources)}",
            remedy="mark a clean source as trusted, or leave finetune out",
        )
    first = recipe.first_filter.blip
    if first:
        follow = [name for name in TRAINED_BY if recipe.filters.get(name, {}).get("weights") == PREVIOUS]
        _check_texts(_texts(recipe, follow), first.positions, "the first filter")
    if spec.objective != "blip":
        return
    for role in LOSSES if recipe.finetune else ():
        _tuned(recipe, spec, role)
    folders = [blip_folder(name, CAPTIONS, MATCHES) for name in spec.blip.start if name != BEGINNING]
    if BEGINNING in spec.blip.start and not first:
        raise PairmillError(
            expected="first_filter.blip, whose beginning pretrain.blip.start names",
            found="a recipe without it",
            remedy="add first_filter: {blip: {}}, name folders of a BLIP, or leave `start` out",
        )
    if BEGINNING in spec.blip.start and first:
        fits(spec.model, shape_of(first), first.positions, [BEGINNING])
    words, positions = None, first.positions if first and spec.blip.start else text_positions(spec.model.context)
    if not spec.blip.start and spec.model.tokenizer != PREVIOUS:
        words = bert_tokenizer(str(_tokenizer_folder(Path(spec.model.tokenizer))))
        mark(words, spec.blip.match_mark)
    elif not spec.blip.start and not first and _captioner(recipe) == PREVIOUS:
        raise PairmillError(
            expected="a captioner whose tokenizer pretraining takes (pretrain.model.tokenizer: previous)",
            found="no first_filter.blip, and no filters.blip_caption with weights",
            remedy="add one of them, or name a BERT tokenizer's folder",
        )
    for folder in folders:
        from training import blip_export  # seconds

        _, sizes, processor = blip_export.opened(folder)
        fits(spec.model, sizes.shape, sizes.context, [str(folder)])
        mark(processor.tokenizer, spec.blip.match_mark)
        words, positions = words or processor.tokenizer, sizes.context
    _check_round(recipe, positions, words)


def _check_round(recipe: Recipe, positions: int, words: Any) -> None:
    """The round's BLIP, of these text positions, serves filters, promotion and evaluation."""
    blip, tokenizer = recipe.pretrain.blip, recipe.pretrain.model.tokenizer
    if blip.start and tokenizer != PREVIOUS:
        raise PairmillError(
            expected="no pretrain.model.tokenizer beside pretrain.blip.start, whose first BLIP brings its own",
            found=tokenizer,
            remedy="leave one of them out",
        )
    if blip.match_mark == "[ENC]" and recipe.filters.get("blip_match", {}).get("weights") == PREVIOUS:
        raise PairmillError(
            expected="pretrain.blip.match_mark: [CLS] where filters.blip_match has `weights: previous`",
            found="[ENC], and blip_match, which judges promotion and evaluation too, begins its texts with [CLS]",
            remedy="leave match_mark out",
        )
    losses = {*blip.losses} | ({"lm", "itm"} if recipe.finetune else set())
    texts = _texts(recipe, [name for name, loss in TRAINED_BY.items() if loss in losses])
    if "lm" in losses:  # what isn't fine-tuned is evaluated behind the prompt that it learned
        another = recipe.finetune and "blip_caption" in recipe.filters
        texts["pretrain.blip.prompt"] = blip.prompt, 2 if another else texts["filters.blip_caption"][1]
    _check_texts(texts, positions, "the BLIP of pretrain", words)


def _texts(recipe: Recipe, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Prompt and `max_tokens` of these filters' texts, which learning takes two for."""
    loaded: Any = {name: load_filter(name, recipe.filters.get(name, {})) for name in names}
    return {f"filters.{name}": (getattr(one, "prompt", ""), max(2, one.max_tokens)) for name, one in loaded.items()}


def _check_texts(texts: dict[str, tuple[str, int]], positions: int, of: str, words: Any = None) -> None:
    """They fit into a BLIP's text positions. Without `words`, its tokenizer, a prompt has a piece for each word, as the
    first filter's makes them."""
    for where, (prompt, tokens) in texts.items():
        if words is None and len(prompt) + tokens <= positions:  # a piece has a letter at least
            continue
        if words is None:
            from transformers import BertTokenizerFast  # seconds

            words = BertTokenizerFast()
        pieces = len(words(prompt, add_special_tokens=False)["input_ids"])
        if pieces + tokens > positions:
            raise PairmillError(
                expected=f"texts within the {positions} text positions of {of}, at {where}",
                found=f"{pieces} tokens of the prompt, {tokens} of the text",
                remedy="lower its max_tokens, shorten the prompt, or raise the model's context",
            )


def warnings(recipe: Recipe) -> list[str]:
    """What a recipe may do and shouldn't: captioner and filter of one training."""
    found, filters = [], recipe.filters
    if recipe.pretrain.objective == "blip" and recipe.finetune is None:
        found.append(f"without `finetune` captioner and match filter are of one training ({BIAS})")
    if {"blip_caption", "blip_match"} <= filters.keys():
        named = [str(filters[name].get("weights", PREVIOUS)) for name in ("blip_caption", "blip_match")]
        one, other = map(_training, named)
        if one is not None and one == other:
            found.append(
                f"the weights of blip_caption and blip_match, {' and '.join(named)}, are of one training ({BIAS})"
            )
    return found


def _training(weights: str) -> str | None:
    """The training that a folder of weights is of, as its card tells."""
    if not Path(weights).is_dir():
        return None
    from training.checkpoint import CARD  # seconds

    card = Path(weights) / CARD
    return json.loads(card.read_text()).get("config") if card.exists() else None


def settled(run: Run, number: int) -> PretrainSpec:
    """A round's pretraining with its folders named by content. Without fine-tuning, the captioner learns to write
    behind the prompt that it will be given."""
    spec, space = run.recipe.pretrain, run.workspace
    blip = spec.blip
    if run.recipe.finetune is None and "prompt" not in blip.model_fields_set:
        blip = _with(blip, prompt=_prompt(run.recipe, blip))
    if blip.start:
        blip = _with(blip, start=[_start(run, number, name) for name in blip.start])
        tokenizer = blip.start[0]
    else:
        own = spec.model.tokenizer != PREVIOUS
        weights = spec.model.tokenizer if own else _captioner(run.recipe)
        if weights == PREVIOUS:
            folder = model_folder(space, _scorer(run, number)["captioner"])
        else:
            folder = Path(weights) if own else blip_folder(weights, CAPTIONS)
        tokenizer = publish_folder(space, _tokenizer_folder(folder), TOKENIZER_FILES)
    return spec.model_copy(update={"blip": blip, "model": spec.model.model_copy(update={"tokenizer": tokenizer})})


def finetune(run: Run, number: int, record: Facts, known: training_jobs.Shards, picked: Facts) -> dict[str, Facts]:
    """The records, by role, of the trainings on the trusted pairs (`known`, shards by source) that go on from the
    round's BLIP, whose `record` is given; `picked` are the facts of its curation."""
    assert run.recipe.finetune is not None
    spec = settled(run, number)
    selection = curation.select_trusted(run, known, picked["scores"])
    start = [f"models/{sha}" for _, sha in sorted(record["models"].items())]
    records = {}
    for role, losses in LOSSES.items():
        blip = _with(spec.blip, losses=losses, start=start, prompt=_prompt(run.recipe, spec.blip))
        weights = {name: times for name, times in spec.weights.items() if name in known}
        model = spec.model.model_copy(update={"tokenizer": start[0]})
        own = _tuned(run.recipe, spec, role, blip=blip, weights=weights, model=model)
        records[role] = training_jobs.pretrain(run, f"round-{number}/{role}", selection, known, own, picked["apart"])
    return records


def _tuned(recipe: Recipe, spec: PretrainSpec, role: str, **changes: Any) -> PretrainSpec:
    """The settings of a role's fine-tuning."""
    tune = getattr(recipe.finetune, role).model_dump(exclude_none=True)
    return strict(PretrainSpec, dict(spec) | tune | changes, f"finetune.{role}")


def _start(run: Run, number: int, name: str) -> str:
    """The name in the workspace of what `blip.start` names."""
    if name != BEGINNING:
        return publish_folder(run.workspace, blip_folder(name, CAPTIONS, MATCHES), BLIP_FILES)
    return f"models/{_scorer(run, number)[BEGINNING]}"


def _scorer(run: Run, number: int) -> dict[str, str]:
    """The models that score the round, by role."""
    return dict(run.read(f"round-{number}/curation.json")["scorer"]["models"])


def _with(blip: MedSpec, **changes: Any) -> MedSpec:
    return blip.model_copy(update=changes)


def _prompt(recipe: Recipe, blip: MedSpec) -> str:
    """What stands before the captions that are written."""
    settings = recipe.filters.get("blip_caption")
    return blip.prompt if settings is None else str(load_filter("blip_caption", settings).prompt)  # type: ignore[attr-defined]


def _captioner(recipe: Recipe) -> str:
    """The weights of the captioner that writes for a round: published ones, a folder, or `previous`."""
    settings = recipe.filters.get("blip_caption")
    return PREVIOUS if settings is None else str(load_filter("blip_caption", settings).weights)  # type: ignore[attr-defined]


def _tokenizer_folder(folder: Path) -> Path:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not {"tokenizer.json", "vocab.txt"} & {*names}:
        raise PairmillError(
            expected=f"a BERT tokenizer (tokenizer.json or vocab.txt) in {folder}, for pretrain.model.tokenizer",
            found=", ".join(names) or ("an empty folder" if folder.is_dir() else "no such folder"),
            remedy="name a folder that a tokenizer's save_pretrained wrote, such as a BLIP's, or `previous`",
        )
    return folder
