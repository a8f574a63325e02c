"""What a recipe says of a training: a CLIP's or a BLIP's, and the small BLIP's before round 1."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pairs.errors import PairmillError
from pairs.strict import Spec

PREVIOUS = "previous"  # in a setting: the model of the round before
BEGINNING = "beginning"  # in `blip.start`: what the first filter's captioner and match filter share


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


Shape = tuple[int, int, tuple[int, int, int], tuple[int, int, int], int]


def fits(m: ModelSpec, shape: Shape, positions: int, names: list[str]) -> None:
    """Raises PairmillError where a BLIP of this shape isn't what `m` asks for."""
    if shape != (asked := shape_of(m)) or positions < m.context:
        raise PairmillError(
            expected=f"a BLIP of {asked} (image_px, patch_px, layers, width and heads of both towers, embed_dim), and "
            f"{m.context} text positions (context)",
            found=f"{shape} and {positions} positions in {names}",
            remedy="say the same sizes under pretrain.model",
        )


def text_positions(tokens: int) -> int:
    """Of a new BLIP whose texts have so many tokens: one that is written has its prompt too."""
    return max(64, 2 * tokens)


def shape_of(m: "ModelSpec | BlipSpec") -> Shape:
    vision, text = ((tower.layers, tower.width, tower.heads) for tower in (m.vision, m.text))
    return m.image_px, m.patch_px, vision, text, m.embed_dim


class MedSpec(Spec):
    """BLIP's objective. `start` are folders of transformers' BLIP to go on from (captioner, matcher, or both of one
    training), the first of which names the tokenizer too; or `beginning`, as BLIP starts from a DeiT and a BERT: the
    image tower and the words that the first filter learned on the trusted pairs before it wrote and matched."""

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
        unknown += [f"model.{name}" for name in _set(self.model, "kind", "positions", "logit_scale", "vocabulary")]
        if self.objective == "blip" and unknown:
            raise ValueError(f"objective: blip knows no {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _a_pair_for_each(self) -> "PretrainSpec":
        if self.batch_pairs < self.workers:
            raise ValueError(f"batch_pairs {self.batch_pairs} leave some of the {self.workers} workers without a pair")
        if self.objective == "blip" and self.model.tokenizer == "clip" and not self.blip.start:
            raise ValueError("objective: blip needs a BERT tokenizer's folder (model.tokenizer) or blip.start")
        if self.objective != "blip" and self.model.tokenizer == PREVIOUS:
            raise ValueError("model.tokenizer: previous goes with objective: blip")
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

    @property
    def positions(self) -> int:
        return text_positions(self.max_tokens)

    @model_validator(mode="after")
    def _fits(self) -> "BlipSpec":
        _patches_fit(self.image_px, self.patch_px)
        return self


class TuneSpec(Spec):
    """What fine-tuning changes of the pretraining's settings."""

    steps: int = Field(200, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    warmup_steps: int = Field(20, ge=0)
    batch_pairs: int | None = Field(None, ge=2)  # as in pretraining


class FinetuneSpec(Spec):
    """Captioner (lm) and match filter (itc, itm), each trained on the trusted pairs from the round's BLIP."""

    captioner: TuneSpec = TuneSpec()
    matcher: TuneSpec = TuneSpec()
