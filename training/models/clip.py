"""CLIP over packed patches and tokens; its state dict is open_clip's, name for name and shape for shape.

An image of the model's own square and any text give open_clip's features. Another aspect gives another grid
of patches: the learned position embeddings are resized to it (bicubic, antialiased, as open_clip resizes them) by one
matrix per grid, cached. The text tower may hold the rows of its vocabulary that a run can meet and no others:
`token_embedding` is then shorter, and `with_vocabulary` puts the rows back. CLIP: arXiv 2103.00020.

Legend: T tokens of all segments, D width, E embedding width, P patch side in pixels.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.transformer import Transformer
from training.packing import CLIP, Grid, PackedImages, PackedTexts

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels in [0, 1]; open_clip's defaults, written into the export
STD = (0.26862954, 0.26130258, 0.27577711)


class Vision(nn.Module):
    """Packed images to features (images, E)."""

    def __init__(
        self, grid: int, patch_px: int, width: int, layers: int, heads: int, embed_dim: int, backend: str,
        factorised: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid, scale = grid, width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_px, patch_px, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positions = Positions(grid, width, scale) if factorised else None
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 if factorised else grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, backend)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: PackedImages) -> Tensor:
        x_TD = F.linear(pixels(images, MEAN, STD).to(self.conv1.weight), self.conv1.weight.flatten(1))
        x_TD = x_TD + self._places(images.grids)[images.place]
        x_TD = self.transformer(self.ln_pre(x_TD), images.layout)
        features: Tensor = self.ln_post(x_TD)[images.pool] @ self.proj
        return features

    def _places(self, grids: tuple[Grid, ...]) -> Tensor:
        """(1 + cells of all grids, D): what is added to a class token, then to each cell of each grid."""
        own = self.positional_embedding
        with torch.autocast(own.device.type, enabled=False):
            first = (own[0] + self.class_embedding)[None]
            cells = resized(own[1:], self.grid, grids) if self.positions is None else self.positions(grids)
            return torch.cat([first, cells])


class Positions(nn.Module):
    """Factorised positions (NaViT, arXiv 2307.06304): a vector for the row plus one for the column, each resized
    linearly to the grid's side."""

    def __init__(self, side: int, width: int, scale: float) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(scale * torch.randn(side, width)) for _ in range(2))

    def forward(self, grids: tuple[Grid, ...]) -> Tensor:
        return torch.cat([self._cells(grid) for grid in grids])

    def _cells(self, grid: Grid) -> Tensor:
        sides = (self.rows, self.columns)
        row_HD, column_WD = (
            F.interpolate(x.T[None], size=n, mode="linear", align_corners=False)[0].T
            for x, n in zip(sides, grid, strict=True)
        )
        return (row_HD[:, None] + column_WD).flatten(0, 1)


def resized(own: Tensor, side: int, grids: tuple[Grid, ...]) -> Tensor:
    """Learned positions (side², D) resized to each of the `grids`, one below the other."""
    return torch.cat([_there(side, grid, own.device, own.dtype) for grid in grids]) @ own


@functools.lru_cache(maxsize=4096)
def _there(side: int, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`_resizing` where it is used, since a copy in each step would be waited for."""
    return _resizing(side, grid).to(device, dtype)


def _resizing(side: int, grid: Grid) -> Tensor:
    """(h·w, side²): the linear map that resizes a square of positions to `grid`; the identity for its own."""
    cells = side * side
    if grid == (side, side):
        return torch.eye(cells)
    basis = torch.eye(cells).reshape(cells, 1, side, side)
    resized = F.interpolate(basis, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(1).T.contiguous()


def pixels(images: PackedImages, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float patches; uint8 pixels are shifted and scaled (`mean`, `std` of RGB), and rows of class tokens stay zero."""
    if images.patches.is_floating_point():
        return images.patches
    shift, scale = _levels((*mean,), (*std,), images.patches.shape[1] // 3, images.patches.device)
    return ((images.patches - shift) / scale).masked_fill_((images.place == 0)[:, None], 0)


@functools.lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], each: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3 · `each`,) what pixels in [0, 255] are shifted and scaled by."""
    shift, scale = (255 * torch.tensor(x, device=device).repeat_interleave(each) for x in (mean, std))
    return shift, scale


class Towers(nn.Module):
    """What the models share. `forward` gives L2-normalised features (images, E), (texts, E), the logit scale (> 0), and
    the logit bias, None where the model has none. `form` says how their examples are packed."""

    form = CLIP
    tokenizer = "clip"
    visual: "Vision | nn.Module"
    transformer: Transformer
    token_embedding: nn.Embedding
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    head: nn.Module | None  # in the place of the text tower (see `locked`)

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, images: PackedImages, texts: PackedTexts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        features = self.encode_image(images), self.head(texts) if self.head else self.encode_text(texts)
        image_BE, text_BE = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in features)
        bias = None if self.logit_bias is None else self.logit_bias.clone()  # FSDP2 hooks each output, each step
        return image_BE, text_BE, self.logit_scale.exp(), bias

    def encode_image(self, images: PackedImages) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def encode_text(self, texts: PackedTexts) -> Tensor:
        raise NotImplementedError

    def with_vocabulary(self, rows: Tensor) -> None:
        """Replaces the token table by `rows` (tokens, D); token ids then index them."""
        self.token_embedding = nn.Embedding.from_pretrained(rows.detach().clone(), freeze=False)


class PackedClip(Towers):
    """CLIP's towers. `vision` and `text` are (layers, width, heads)."""

    def __init__(
        self,
        embed_dim: int,
        image_px: int,
        patch_px: int,
        vision: tuple[int, int, int],
        text: tuple[int, int, int],
        context: int,
        vocabulary: int,
        backend: str = "auto",
        logit_scale: float = math.log(1 / 0.07),
        logit_bias: float | None = None,
        factorised: bool = False,
    ) -> None:
        super().__init__()
        assert image_px % patch_px == 0, (image_px, patch_px)
        layers, width, heads = vision
        self.visual = Vision(image_px // patch_px, patch_px, width, layers, heads, embed_dim, backend, factorised)
        layers, width, heads = text
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = Transformer(width, layers, heads, backend)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, texts: PackedTexts) -> Tensor:
        x_TD = self.token_embedding(texts.tokens) + self.positional_embedding[texts.positions]
        x_TD = self.transformer(x_TD, texts.layout)
        features: Tensor = self.ln_final(x_TD[texts.pool]) @ self.text_projection
        return features
