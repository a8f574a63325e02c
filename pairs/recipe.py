"""A recipe: one YAML file that states one run. Strict, without inheritance or interpolation.

Only the shape is checked here. The settings of a source, a filter or a reducer are checked by the module
of that name on its own floor (`pairs.strict.strict`), before anything runs.
"""

import functools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pairs.errors import PairmillError
from pairs.fingerprint import LENGTH, content_hash
from pairs.strict import nearest, strict

FITTED = ("top_fraction", "quantile", "target_recall")
TESTS = ("min", "max", "between", "equals", "among", "in_list", *FITTED, "is_null")
Share = Annotated[float, Field(ge=0, le=1)]
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"  # a pattern isn't anchored by itself, and names become folders


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


def _list_hash(path: str) -> str:
    """The content hash of a file of uids, which may be large: taken once as long as the file stays as it is."""
    facts = Path(path).stat() if Path(path).exists() else None
    return _hashed(path, facts.st_mtime_ns if facts else 0, facts.st_size if facts else 0)


@functools.cache
def _hashed(path: str, mtime_ns: int, size: int) -> str:
    return content_hash(Path(path))


class Condition(Spec):
    """What a column's value must be to stay. `between` is min and max; the others of `FITTED` become a threshold that
    the selection finds once and pins: over all rows (`top_fraction`, `quantile`) or over canaries (`target_recall`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    min: float | None = None
    max: float | None = None
    between: tuple[float, float] | None = None
    equals: str | float | bool | None = None
    among: list[str | float] | None = Field(None, alias="in")
    in_list: str | None = None  # a file of uids in DataComp's format
    top_fraction: float | None = Field(None, gt=0, le=1)
    quantile: tuple[Share, Share] | None = None  # what lies between these two stays
    target_recall: float | None = Field(None, gt=0, le=1)  # the share of a defect's fitting canaries that is dropped
    defect: str | None = None
    drop: Literal["below", "above"] | None = None  # on which side `target_recall` drops; below
    is_null: bool | None = None

    @property
    def given(self) -> list[str]:
        """The tests that are stated."""
        return [name for name in TESTS if getattr(self, name) is not None]

    @property
    def fitted(self) -> bool:
        """Whether a threshold has to be found first."""
        return any(getattr(self, name) is not None for name in FITTED)

    @property
    def told(self) -> str:
        """The tests in words. A list is named by its content: another path to the same uids is the same rule."""
        tests = self.model_dump(exclude_none=True, include={*TESTS, "defect", "drop"})
        if self.in_list is not None:
            tests["in_list"] = _list_hash(self.in_list)[:LENGTH]
        return " ".join(f"{name} {list(v) if isinstance(v, tuple) else v}" for name, v in tests.items())

    @property
    def identity(self) -> dict[str, Any]:
        """What it is in a fingerprint: a list counts by its content, not by its path."""
        told = self.model_dump(exclude_none=True, exclude={"sources"})
        return told | ({"in_list": _list_hash(self.in_list)} if self.in_list is not None else {})

    @model_validator(mode="after")
    def _fits(self) -> "Condition":
        for name in FITTED:
            if getattr(self, name) is not None and len(self.given) > 1:
                raise ValueError(f"`{name}` stands alone: write another rule for the rest")
        if self.between is not None and (self.min is not None or self.max is not None):
            raise ValueError("`between` is min and max: give one or the other")
        for pair in (self.between, self.quantile):
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{list(pair)} ends before it begins")
        if (self.target_recall is None) != (self.defect is None):
            raise ValueError("`target_recall` and `defect` go together: whose canaries the threshold must drop")
        if self.drop is not None and self.target_recall is None:
            raise ValueError("`drop` belongs to `target_recall`")
        return self


class Rule(Condition):
    """One line of `keep`. A list column is judged by `over`: any, all or first of its values. `sources` states another
    condition for some sources; `off` there means that the rule doesn't judge them."""

    column: str | None = None
    over: Literal["any", "all", "first"] = "first"
    sources: dict[str, Condition | Literal[False]] | None = None
    one_per: str | None = None
    best: str | None = None
    quarantine: Literal[True] | None = None  # what the rule drops is never shown; null keeps older fingerprints

    @model_validator(mode="after")
    def _quarantine_has_a_column(self) -> "Rule":
        if self.quarantine and self.column is None:
            raise ValueError("`quarantine` belongs to a rule with a `column`")
        return self

    @model_validator(mode="after")
    def _one_shape(self) -> "Rule":
        if self.one_per is not None:
            if self.column is not None or self.given or self.sources is not None:
                raise ValueError("`one_per` stands alone, with `best`")
        elif self.best is not None:
            raise ValueError("`best` belongs to `one_per`")
        elif self.column is None or not self.given:
            raise ValueError(f"a rule names a `column` and one of {', '.join(TESTS).replace('among', 'in')}")
        for source, other in (self.sources or {}).items():
            if other and not other.given:
                raise ValueError(f"`sources.{source}` states no test: give one, or `off`")
        return self

    @property
    def name(self) -> str:
        """How the funnel and the reports call this rule."""
        if self.one_per is not None:
            return f"one_per {self.one_per}" + (f" best {self.best}" if self.best else "")
        over = "" if self.over == "first" else f"{self.over} "
        others = "; ".join(f"{name}: {c.told if c else 'off'}" for name, c in (self.sources or {}).items())
        return f"{over}{self.column} {self.told}" + (f" ({others})" if others else "")

    @property
    def identity(self) -> dict[str, Any]:
        others = {name: condition and condition.identity for name, condition in (self.sources or {}).items()}
        return super().identity | ({"sources": others} if others else {})

    def cases(self) -> dict[str, "Rule | None"]:
        """The rule without overrides (under ""), and as it judges each source that has one; None where it is off."""
        fields = {*TESTS, "defect", "drop"}
        cases: dict[str, Rule | None] = {}
        for source, condition in {"": self, **(self.sources or {})}.items() if self.column is not None else ():
            tests = condition.model_dump(exclude_none=True, include=fields) if condition else {}
            cases[source] = Rule(column=self.column, over=self.over, **tests) if condition else None
        return cases


class TextsSpec(Spec):
    """Which texts a kept pair keeps (CapFilt). `from` lists the columns, in the order `match` scored them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    sources: list[str] = Field(["texts"], alias="from")
    match: str | None = None
    min: float = 0.5
    keep: Literal["all", "first", "best", "both"] = "all"


class CanariesSpec(Spec):
    """Pairs with a planted defect. They are made from trusted pairs; where a recipe has none, from all."""

    per_defect: int = Field(200, ge=0)
    max_fraction: float = Field(0.05, ge=0, le=1)  # of the pairs that they can be made from
    defects: list[str] | None = None  # which are planted; all


class GatesSpec(Spec):
    min_pairs: int = Field(1, ge=0)
    min_fetch_success: float = Field(0.0, ge=0, le=1)
    min_canary_recall: Share | dict[str, Share] = 0.0  # of every defect, or by defect


class TowerSpec(Spec):
    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> "TowerSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of its {self.heads} heads")
        return self


def _patches_fit(image_px: int, patch_px: int) -> None:
    if image_px % patch_px:
        raise ValueError(f"image_px {image_px} is not a multiple of patch_px {patch_px}")


class ModelSpec(Spec):
    """A CLIP of open_clip's architecture, or SigLIP's towers (as wide as the embedding; texts of `context` tokens).

    `image_px` is a multiple of `patch_px`. The logit scale starts at exp(`logit_scale`), and there is a logit bias
    where one is given (siglip's objective needs it). `tokenizer`: clip, or a Hugging Face tokenizer's name or folder.
    """

    kind: Literal["clip", "siglip"] = "clip"
    tokenizer: str = "clip"
    positions: Literal["learned", "factorised"] = "learned"  # factorised: a vector for the row and one for the column
    embed_dim: int = Field(128, ge=1)
    image_px: int = Field(64, ge=1)
    patch_px: int = Field(8, ge=1)
    vision: TowerSpec = TowerSpec(layers=4, width=128, heads=4)
    text: TowerSpec = TowerSpec(layers=3, width=128, heads=4)
    context: int = Field(32, ge=3)  # tokens of a text, its two marks included
    vocabulary: int = Field(49408, ge=1)
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ModelSpec":
        _patches_fit(self.image_px, self.patch_px)
        if self.kind == "siglip" and (self.embed_dim != self.vision.width or self.logit_bias is None):
            raise ValueError("siglip has a logit_bias, and an embed_dim that is vision.width")
        if self.kind == "siglip" and self.positions != "learned":
            raise ValueError("siglip has learned positions")
        return self


class StartSpec(Spec):
    """What a tower starts from: `weights` (a folder in open_clip's format, or its NAME:TAG), which `lock` keeps as they
    are (LiT, arXiv 2111.07991), but for the last `unlocked_groups`, counted as open_clip counts them: the projection is
    1, the last block with the final norm 2. Or a tower of another make, known by the columns of `features` that filters
    made with it: a head on them is trained, with `hidden` layers; or none, where `lock` takes the column as it is."""

    weights: str | None = None
    lock: bool = False
    unlocked_groups: int = Field(0, ge=0)
    features: list[str] = []
    hidden: list[Annotated[int, Field(ge=1)]] = []
    dropout: float = Field(0.0, ge=0, lt=1)  # of the head's inputs and hidden layers
    residual: bool = False  # the last column, which is of the embedding's width, is added to what the head makes

    @model_validator(mode="after")
    def _one_kind(self) -> "StartSpec":
        if self.features and (self.weights or self.unlocked_groups):
            raise ValueError("`features` are of another tower: `weights` and `unlocked_groups` don't go with them")
        if not self.features and (self.hidden or self.dropout or self.residual):
            raise ValueError("`hidden`, `dropout` and `residual` are of the head on `features`")
        if self.unlocked_groups and not self.lock:
            raise ValueError("`unlocked_groups` needs `lock`")
        if self.lock and not (self.weights or self.features):
            raise ValueError("`lock` needs `weights` or `features`: random weights would never learn")
        return self


class TowersSpec(Spec):
    image: StartSpec = StartSpec()
    text: StartSpec = StartSpec()


class MedSpec(Spec):
    """BLIP's objective. `start` are folders of transformers' BLIP to go on from (captioner, matcher, or both of one
    training), the first of which names the tokenizer too."""

    losses: list[Literal["itc", "itm", "lm"]] = ["itc", "itm", "lm"]  # captioner: lm; match filter: itc and itm
    start: list[str] = []
    alpha: float = Field(0.4, ge=0, le=1)  # share of the soft targets, after a ramp
    ramp_epochs: float = Field(2.0, ge=0)
    momentum: float = Field(0.995, ge=0, le=1)
    queue: int = Field(57600, ge=1)
    smoothing: float = Field(0.1, ge=0, lt=1)
    prompt: str = ""  # before what the captioner writes
    match_mark: Literal["[CLS]", "[ENC]"] = (
        "[CLS]"  # begins a text that is matched; transformers' models are given [CLS]
    )

    @model_validator(mode="after")
    def _contrast_draws(self) -> "MedSpec":
        if not self.losses or ("itm" in self.losses) != ("itc" in self.losses):
            raise ValueError("losses are lm, or itc and itm (whose wrong texts itc draws), or all three")
        return self


class PretrainSpec(Spec):
    objective: Literal["clip", "siglip", "blip"] = "clip"
    blip: MedSpec = MedSpec()
    model: ModelSpec = ModelSpec()
    towers: TowersSpec = TowersSpec()  # which of them start from weights, or stay as they are
    workers: int = Field(2, ge=1)
    batch_pairs: int = Field(64, ge=2)
    steps: int = Field(500, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.98, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    max_patches: int = Field(64, ge=1)  # token budget of an image; its aspect stays
    patch_dropout: float = Field(0.0, ge=0, lt=1)  # share of an image's patches that training leaves out (FLIP)
    jitter: float = Field(0.15, ge=0, lt=0.5)  # turn, stretch, zoom and shift; no mirror: captions say left and right
    token_multiple: int = Field(1, ge=1)  # above 1, streams are filled up to one shape, which is a multiple of it
    weights: dict[str, Annotated[float, Field(ge=0.001, le=100)]] = {}  # times that an epoch meets a source's pairs; 1
    loader_workers: int = Field(0, ge=0, le=256)  # processes of each rank that decode images; 0: a thread
    cache: str | None = None  # a local folder that keeps blocks of far shards
    cache_gb: float = Field(50.0, gt=0)
    accumulate: int = Field(1, ge=1)  # parts that a rank computes a batch in, for memory; the gradients are the same
    activations: Literal["all", "products", "inputs"] = "all"  # what is kept for the backward; the rest is recomputed
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and moments are cut over the workers (FSDP2)
    deterministic: bool = False  # equal bytes on every run on one machine, or an error; slower on a GPU
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the moving average of the weights that is exported; 0: none
    attention: Literal["auto", "reference", "sdpa", "varlen", "flash_attn", "flex", "triton"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False  # the blocks by torch.compile: a minute at every start
    checkpoint_every: int = Field(100, ge=1)
    keep_best: bool = False  # beside the last two, the checkpoint of the lowest mean loss since the one before it
    tensorboard: bool = False  # TensorBoard's files beside metrics.jsonl
    profile_steps: int = Field(0, ge=0)  # so many steps are traced into trace.json
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _siglip_starts_apart(cls, given: Any) -> Any:
        """SigLIP starts at scale 10 and bias -10, because nearly all of its pairs are negatives."""
        if isinstance(given, dict) and given.get("objective") == "siglip" and isinstance(given.get("model", {}), dict):
            return given | {"model": {"logit_scale": math.log(10), "logit_bias": -10.0} | given.get("model", {})}
        return given

    @model_validator(mode="after")
    def _of_its_objective(self) -> "PretrainSpec":
        if self.objective != "blip" and self.blip != MedSpec():
            raise ValueError("settings under `blip` go with objective: blip")
        unknown = _set(self, "accumulate", "ema", "patch_dropout", "max_patches", "towers")
        unknown += [f"model.{name}" for name in _set(self.model, "kind", "positions", "logit_scale")]
        if self.objective == "blip" and unknown:
            raise ValueError(f"objective: blip knows no {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _a_pair_for_each(self) -> "PretrainSpec":
        if self.batch_pairs < self.workers:
            raise ValueError(f"batch_pairs {self.batch_pairs} leave some of the {self.workers} workers without a pair")
        if self.objective == "blip" and self.model.tokenizer == "clip" and not self.blip.start:
            raise ValueError("objective: blip needs a BERT tokenizer's folder (model.tokenizer) or blip.start")
        if (self.objective == "siglip") != (self.model.logit_bias is not None):
            raise ValueError("a model.logit_bias goes with objective: siglip, and only with it")
        return self


def _set(spec: Spec, *names: str) -> list[str]:
    """Those of the settings that aren't as they are without a word."""
    return [name for name in names if getattr(spec, name) != type(spec).model_fields[name].default]


class BlipSpec(Spec):
    """A small BLIP, trained on the trusted pairs with transformers' own losses."""

    image_px: int = Field(64, ge=1)
    patch_px: int = Field(8, ge=1)
    vision: TowerSpec = TowerSpec(layers=2, width=96, heads=4)
    text: TowerSpec = TowerSpec(layers=2, width=96, heads=4)
    embed_dim: int = Field(64, ge=1)
    vocabulary: int = Field(2000, ge=64)
    max_tokens: int = Field(35, ge=8)
    prompt: str = "a picture of "  # the captioner writes what follows it
    word_steps: int = Field(600, ge=1)  # the beginning that captioner and filter share
    caption_steps: int = Field(500, ge=1)
    match_steps: int = Field(350, ge=1)
    batch_pairs: int = Field(32, ge=2)
    negatives: int = Field(2, ge=1)  # wrong texts for each image of a step
    positive_weight: float = Field(8.0, gt=0)  # of a right text: web texts are mostly right, wrong ones seldom as hard
    temperature: float = Field(0.07, gt=0)
    learning_rate: float = Field(4e-3, gt=0)  # of the word stage; the others' are shares of it
    caption_rate: float = Field(0.8, gt=0)
    match_rate: float = Field(0.5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    checkpoint_every: int = Field(200, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "BlipSpec":
        _patches_fit(self.image_px, self.patch_px)
        return self


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
    evaluate: EvaluateSpec = EvaluateSpec()
    rounds: int = Field(1, ge=1)
    engine: Literal["ray", "inline"] = "ray"
    workers: int = Field(2, ge=1)  # actors that score shards
    seed: int = 0

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
    def _rounds_train_clips(self) -> "Recipe":
        first = self.first_filter.clip
        if "blip" in (self.pretrain.objective, first.objective if first else ""):
            raise ValueError("rounds train and evaluate a CLIP: objective is clip or siglip (blip: a job of its own)")
        if first and (first.towers.image.features or first.towers.text.features):
            raise ValueError("first_filter.clip takes no `features`: it is trained before any filter makes them")
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
