"""A recipe: one YAML file that states one run. Strict, without inheritance or interpolation.

Only the shape is checked here. The settings of a source, a filter or a reducer are checked by the module
of that name on its own floor (`pairs.strict.strict`), before anything runs.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, model_validator

from pairs.errors import PairmillError
from pairs.pretrain import PREVIOUS, BlipSpec, FinetuneSpec, PretrainSpec
from pairs.rules import Rule, Share, TextsSpec
from pairs.strict import Spec, nearest, strict

NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"  # a pattern isn't anchored by itself, and names become folders


class SourceSpec(Spec):
    """Where pairs come from. `kind` names a module of `pipelines/sources`; what else it takes is `settings`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str
    trusted: bool = False
    allow: list[str] = []  # networks that the egress guard lets through, for example 127.0.0.0/8

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BlockSpec(Spec):
    """Files of what must never be fetched or kept, one a line; `radius` in bits for the perceptual hashes."""

    hosts: str | None = None
    sha256: str | None = None
    perceptual: str | None = None
    radius: int = Field(4, ge=0, le=16)


class FetchSpec(Spec):
    # a product token, by which robots.txt knows us, then a contact; it may be missing for loopback alone
    agent: str = Field("pairmill", pattern=r"^[A-Za-z][A-Za-z0-9_.-]*([/ ][ -~]*)?$")
    side_px: int = Field(256, ge=8)  # the longer side is at most this
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(92, ge=1, le=100)
    shard_pairs: int = Field(10_000, ge=1)
    per_host: int = Field(4, ge=1)  # connections to one host at a time
    delay_s: float = Field(0.0, ge=0, le=60)  # between the starts of two requests to a host
    connections: int = Field(64, ge=1)
    deadline_s: float = Field(30.0, gt=0)  # for one URL, redirects and body together
    max_bytes: int = Field(20_000_000, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    attempts: int = Field(3, ge=1)
    min_side_px: int = Field(8, ge=1)
    retry_hours: float = Field(1.0, ge=0)  # what failed for a time waits so long, then four times as long, …
    retry_hours_max: float = Field(168.0, ge=0)
    stuck_s: float = Field(300.0, gt=0)  # a shard without progress for so long is begun anew
    block: BlockSpec = BlockSpec()


class CanariesSpec(Spec):
    """Pairs with a planted defect. They are made from trusted pairs; where a recipe has none, from all."""

    per_defect: int = Field(200, ge=0)
    max_fraction: float = Field(0.05, ge=0, le=1)  # of the pairs that they can be made from
    defects: list[str] | None = None  # which are planted; all


class GatesSpec(Spec):
    min_pairs: int = Field(1, ge=0)
    min_fetch_success: float = Field(0.0, ge=0, le=1)
    min_captions: Share = 0.0  # the share of the untrusted pairs that blip_caption writes a caption for
    min_canary_recall: Share | dict[str, Share] = 0.0  # of every defect, or by defect


class FirstFilterSpec(Spec):
    """What is trained on the trusted pairs before round 1; without it, filters name published weights."""

    clip: PretrainSpec | None = None
    blip: BlipSpec | None = None


class ZeroShotSpec(Spec):
    path: str  # a folder with one sub-folder per class, named for it
    templates: list[str] = ["a picture of a {}"]


class EvaluateSpec(Spec):
    zero_shot: ZeroShotSpec | None = None
    retrieval: bool = True  # on the held-out trusted pairs
    pairs: int = Field(5000, ge=2)  # of them at most, for retrieval and captions
    reranked: int = Field(16, ge=1)  # texts of an image, and images of a text, that a match head orders


class Recipe(Spec):
    name: str = Field(pattern=NAME)
    sources: dict[Annotated[str, Field(pattern=NAME)], SourceSpec] = Field(min_length=1)
    fetch: FetchSpec = FetchSpec()
    filters: dict[str, dict[str, Any]] = {}
    reducers: dict[str, dict[str, Any]] = {}
    keep: list[Rule] = []
    texts: TextsSpec = TextsSpec()
    canaries: CanariesSpec = CanariesSpec()
    gates: GatesSpec = GatesSpec()
    first_filter: FirstFilterSpec = FirstFilterSpec()
    pretrain: PretrainSpec = PretrainSpec()
    finetune: FinetuneSpec | None = None
    evaluate: EvaluateSpec = EvaluateSpec()
    rounds: int = Field(1, ge=1)
    engine: Literal["ray", "inline"] = "ray"
    workers: int = Field(2, ge=1)  # actors that score shards
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _blip_reads_as_before(cls, given: Any) -> Any:
        """A BLIP of the rounds takes the tokenizer of the captioner in force, unless the recipe names another."""
        spec = given.get("pretrain") if isinstance(given, dict) else None
        if not isinstance(spec, dict) or spec.get("objective") != "blip" or not isinstance(spec.get("model", {}), dict):
            return given
        return given | {"pretrain": spec | {"model": {"tokenizer": PREVIOUS} | spec.get("model", {})}}

    @model_validator(mode="after")
    def _one_per_last(self) -> "Recipe":
        kinds = [rule.one_per is not None for rule in self.keep]
        if kinds != sorted(kinds):
            raise ValueError("`one_per` rules come last in `keep`: the others commute, these don't")
        return self

    @model_validator(mode="after")
    def _weights_are_of_sources(self) -> "Recipe":
        for spec in (self.pretrain, self.first_filter.clip):
            for name in spec.weights if spec else ():
                if name not in self.sources:
                    raise ValueError(
                        f"`weights` names {name!r}, which is no source: {nearest(name, list(self.sources))}"
                    )
        return self

    @model_validator(mode="after")
    def _trainings_fit(self) -> "Recipe":
        first = self.first_filter.clip
        if first and first.objective == "blip":
            raise ValueError("first_filter.clip trains a CLIP; a small BLIP is trained by first_filter.blip")
        if first and (first.towers.image.features or first.towers.text.features):
            raise ValueError("first_filter.clip takes no `features`: it is trained before any filter makes them")
        if self.finetune and self.pretrain.objective != "blip":
            raise ValueError("finetune makes a captioner and a match filter of a BLIP: pretrain.objective is blip")
        return self

    @property
    def trusted(self) -> list[str]:
        return [name for name, source in self.sources.items() if source.trusted]


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """The recipe in the YAML file at `path`."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise PairmillError(
            expected=f"a recipe at {path}",
            found=(error.strerror or str(error)).lower(),
            remedy="see recipes/ for some to start from",
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-99-99 raises a ValueError
        raise PairmillError(
            expected=f"YAML in {path}", found=" ".join(str(error).split()), remedy="correct this line"
        ) from None
    if not isinstance(data, dict):
        raise PairmillError(
            expected=f"a mapping in {path}", found=type(data).__name__, remedy="start from a file in recipes/"
        )
    return strict(Recipe, data, path.name)
