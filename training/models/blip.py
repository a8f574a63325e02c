"""BLIP's mixture of encoder-decoder over packed streams: an image ViT, and one BERT that reads, looks and writes.

The text stack reads alone (ITC), reads while it looks at an image (ITM), and writes while it looks (LM). Encoder and
decoder share all but self-attention and its norm, as the authors tie them. What is computed is what is there: texts of
any length and images of any grid lie in streams without padding, and a text finds its image's patches among all images'
by rows. A layer makes keys and values of the patches once for all streams that look at them. Without dropout. Parts are
transformers' own one by one (`training.blip_export` maps the names). BLIP: arXiv 2201.12086, BERT: arXiv 1810.04805.

Legend: T tokens of a text stream, I of the image stream, D width of the text stack, V of the image tower, E of the
common space, N heads, H width of a head.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import Layout, attend
from training.models.clip import MEAN, STD, pixels, resized
from training.models.transformer import Attention, Mlp, Repeated, Transformer
from training.packing import CLIP, PackedImages

Span = tuple[int, int]  # first row and number of rows of an image in its stream
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sizes:
    """`vision` and `text` are (layers, width, heads); `context` is the number of text positions."""

    image_px: int
    patch_px: int
    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    embed_dim: int
    vocabulary: int
    context: int
    vision_eps: float = 1e-5
    text_eps: float = 1e-12

    @property
    def shape(self) -> tuple[int, int, tuple[int, int, int], tuple[int, int, int], int]:
        return self.image_px, self.patch_px, self.vision, self.text, self.embed_dim


@dataclass(frozen=True)
class Stream:
    """Packed texts, causal where they are written. `first` (texts,) are the rows of their first tokens, in the texts'
    own order; `rows` (I',) the rows of the image stream that text after text looks at, by the layout `sight`."""

    tokens: Tensor
    positions: Tensor
    first: Tensor
    layout: Layout
    rows: Tensor | None = None
    sight: Layout | None = None


def stream(
    texts: Sequence[Tensor],
    device: torch.device,
    spans: Sequence[Span] | None = None,
    causal: bool = False,
) -> Stream:
    """Packs `texts` (token ids on the host); text i looks at the rows `spans[i]`, where they are given. Equal lengths
    become neighbours, which attention takes in one call."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), spans[i][1] if spans else 0))
    lengths = [len(texts[i]) for i in order]
    ends = torch.tensor(lengths).cumsum(0)
    first = torch.empty(len(texts), dtype=torch.int64)
    first[torch.tensor(order)] = ends - torch.tensor(lengths)
    tokens, positions = torch.cat([texts[i] for i in order]), torch.cat([torch.arange(n) for n in lengths])
    rows, sight = None, None
    if spans is not None:
        seen = [spans[i] for i in order]
        rows = torch.cat([torch.arange(start, start + count) for start, count in seen]).to(device, non_blocking=True)
        sight = Layout.of(lengths, keys=[count for _, count in seen]).to(device)
    tokens, positions, first = (x.to(device, non_blocking=True) for x in (tokens, positions, first))
    return Stream(tokens, positions, first, Layout.of(lengths, causal).to(device), rows, sight)


def spans_of(images: PackedImages) -> list[Span]:
    """Where each example's rows lie in the image stream, by what is known of it on the host."""
    counts, start = {}, 0
    for run in images.layout.segments():
        counts[start] = run.length
        start += run.length
    return [(row, counts[row]) for row in images.host_pool.tolist()]


class Vision(nn.Module):
    """Packed images to states (I, V) of all patches and class tokens."""

    def __init__(self, s: Sizes, backend: str) -> None:
        super().__init__()
        layers, width, heads = s.vision
        self.grid = s.image_px // s.patch_px
        self.conv1 = nn.Conv2d(3, width, s.patch_px, s.patch_px)
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(self.grid**2 + 1, width))
        self.transformer = Transformer(width, layers, heads, backend, s.vision_eps)
        self.ln_post = nn.LayerNorm(width, s.vision_eps)

    def forward(self, images: PackedImages) -> Tensor:
        x_IV = F.linear(pixels(images, MEAN, STD).to(self.conv1.weight), self.conv1.weight.flatten(1))
        own, bias = self.positional_embedding, self.conv1.bias
        with torch.autocast(own.device.type, enabled=False):
            cells = resized(own[1:], self.grid, images.grids) + bias  # here, as a class token has no bias
            places = torch.cat([(own[0] + self.class_embedding)[None], cells])
        states: Tensor = self.ln_post(self.transformer(x_IV + places[images.place], images.layout))
        return states


class Cross(nn.Module):
    """Attention of text tokens to the patches of their images, as far as `out_proj`."""

    def __init__(self, width: int, of: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.q, self.kv, self.out_proj = nn.Linear(width, width), nn.Linear(of, 2 * width), nn.Linear(width, width)

    def keys(self, states_IV: Tensor) -> Tensor:
        """(I, 2, N, H)"""
        kv: Tensor = self.kv(states_IV)
        return kv.unflatten(1, (2, self.heads, -1))

    def forward(self, x_TD: Tensor, kv_I2NH: Tensor, look: Stream) -> Tensor:
        assert look.rows is not None and look.sight is not None
        k, v = kv_I2NH[look.rows].unbind(1)
        q_TNH = self.q(x_TD).unflatten(1, (self.heads, -1))
        return attend(q_TNH, k, v, look.sight, self.backend).flatten(1)


class Layer(Repeated):
    """Post-norm, as BERT's. `read` and `write` are the two self-attentions; all else is shared. What follows each
    attention is a region."""

    def __init__(self, s: Sizes, backend: str) -> None:
        super().__init__()
        _, width, heads = s.text
        self.read, self.write = (Attention(width, heads, backend) for _ in range(2))
        self.cross, self.mlp = Cross(width, s.vision[1], heads, backend), Mlp(width)
        self.ln_read, self.ln_write, self.ln_cross, self.ln_mlp = (nn.LayerNorm(width, s.text_eps) for _ in range(4))

    def forward(self, xs: Sequence[Tensor], streams: Sequence[Stream], states_IV: Tensor | None) -> list[Tensor]:
        kv = None if states_IV is None else self.cross.keys(states_IV)
        return [self._one(x, s, kv) for x, s in zip(xs, streams, strict=True)]

    def _one(self, x_TD: Tensor, s: Stream, kv: Tensor | None) -> Tensor:
        own = self.write if s.layout.causal else self.read
        attended_TD = own(F.linear(x_TD, own.in_proj_weight, own.in_proj_bias), s.layout)
        x_TD = self.region(_wrote if s.layout.causal else _read)(self, x_TD, attended_TD)
        if kv is None:
            return self.region(_thought)(self, x_TD)
        return self.region(_saw)(self, x_TD, self.cross(x_TD, kv, s))


def _read(layer: Layer, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
    out: Tensor = layer.ln_read(x_TD + layer.read.out_proj(attended_TD))
    return out


def _wrote(layer: Layer, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
    out: Tensor = layer.ln_write(x_TD + layer.write.out_proj(attended_TD))
    return out


def _saw(layer: Layer, x_TD: Tensor, seen_TD: Tensor) -> Tensor:
    return _thought(layer, layer.ln_cross(x_TD + layer.cross.out_proj(seen_TD)))


def _thought(layer: Layer, x_TD: Tensor) -> Tensor:
    out: Tensor = layer.ln_mlp(x_TD + layer.mlp(x_TD))
    return out


class Text(nn.Module):
    """Streams to states (T, D) of each; all look at the image states, where these are given."""

    def __init__(self, s: Sizes, backend: str) -> None:
        super().__init__()
        layers, width, _ = s.text
        self.token_embedding, self.positional_embedding = (nn.Embedding(n, width) for n in (s.vocabulary, s.context))
        self.ln_embedding = nn.LayerNorm(width, s.text_eps)
        self.layers = nn.ModuleList(Layer(s, backend) for _ in range(layers))

    def forward(self, streams: Sequence[Stream], states_IV: Tensor | None = None) -> list[Tensor]:
        xs = [
            self.ln_embedding(self.token_embedding(s.tokens) + self.positional_embedding(s.positions)) for s in streams
        ]
        for layer in self.layers:
            xs = layer(xs, streams, states_IV)
        return xs


class PackedBlip(nn.Module):
    """All of it. exp(`logit_scale`) is one over the authors' temperature; the exported models have neither."""

    form = CLIP

    def __init__(self, sizes: Sizes, backend: str = "auto", temperature: float = 0.07) -> None:
        super().__init__()
        assert sizes.image_px % sizes.patch_px == 0, (sizes.image_px, sizes.patch_px)
        self.sizes, width = sizes, sizes.text[1]
        self.visual, self.text = Vision(sizes, backend), Text(sizes, backend)
        self.vision_proj = nn.Linear(sizes.vision[1], sizes.embed_dim)
        self.text_proj = nn.Linear(width, sizes.embed_dim)
        self.match_head = nn.Linear(width, 2)
        self.word_dense, self.word_ln = nn.Linear(width, width), nn.LayerNorm(width, sizes.text_eps)
        self.word_bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        for name, parameter in self.named_parameters():
            if "visual.transformer" not in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 * (768 / parameter[0].numel()) ** 0.5)  # BERT's, at its width
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, work: Callable[["PackedBlip"], Result]) -> Result:
        """Does `work` with this model: what wraps a model for several ranks wraps its forward, and a step is more than
        one pass."""
        return work(self)

    def only(self, losses: Collection[str]) -> None:
        """Keeps from training what `losses` (itc, itm, lm) don't reach: wrappers wait for every trained parameter."""
        parts = {
            ("itc", "itm"): ("read", "ln_read"), ("itc",): ("vision_proj", "text_proj", "logit_scale"),
            ("itm",): ("match_head",), ("itm", "lm"): ("cross", "ln_cross"),
            ("lm",): ("write", "ln_write", "word_dense", "word_ln", "word_bias"),
        }  # fmt: skip
        reached = {part: by for by, names in parts.items() for part in names}
        for name, parameter in self.named_parameters():
            by = next((reached[part] for part in name.split(".") if part in reached), tuple(losses))
            parameter.requires_grad_(not set(by).isdisjoint(losses))

    def image_features(self, states_IV: Tensor, images: PackedImages) -> Tensor:
        """(images, E), normalised."""
        return _unit(self.vision_proj(states_IV[images.pool]))

    def text_features(self, texts: Stream) -> Tensor:
        """(texts, E), normalised, of texts alone."""
        (x_TD,) = self.text([texts])
        return _unit(self.text_proj(x_TD[texts.first]))

    def matches(self, x_TD: Tensor, texts: Stream) -> Tensor:
        """Logits (texts, 2): no match, match."""
        logits: Tensor = self.match_head(x_TD[texts.first])
        return logits

    def words(self, x_TD: Tensor) -> Tensor:
        """Logits (rows, vocabulary) of the token that follows each."""
        x_TD = self.word_ln(F.gelu(self.word_dense(x_TD)))
        return F.linear(x_TD, self.text.token_embedding.weight, self.word_bias)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
