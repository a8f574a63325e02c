"""Embeddings as arrays, their cosines, and spherical k-means (faiss) with one thread and a fixed seed.

Cosines are told by float64 sums of products that are exact, so they are the same in whatever block a pair stands; fp32
products of whole blocks only say which pairs are worth that. Training looks at no more than 131,072 rows: 270 MB for
512 numbers a row, and some minutes for 3,000 clusters on one core.
"""

import numpy as np
import pyarrow as pa

from filters.columns import list_lengths, one_chunk
from pairs.errors import PairmillError

SAMPLE = 131_072
SEEN = 40  # rows of the sample for a cluster, at least
ROUNDS = 20
BLOCK = 4096


def vectors(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a column of lists as (M, D) fp16, and which rows these are: no null, zero or infinite ones."""
    lists = one_chunk(column)
    length_N = list_lengths(lists)
    width = int(length_N.max(initial=0))
    if (wrong := np.flatnonzero((length_N != width) & (length_N > 0))).size:
        raise PairmillError(
            expected=f"embeddings of one length in {name}, which semantic_duplicates.embedding names",
            found=f"{length_N[wrong[0]]} numbers and {width}",
            remedy="name a column that one model has made",
        )
    found_MD = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float16).reshape(-1, max(width, 1))
    good = np.isfinite(found_MD).all(axis=1) & (found_MD != 0).any(axis=1)
    known = length_N > 0
    known[known] = good
    return found_MD[good], known


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """The vectors with length 1, fp32."""
    wide = vectors_ND.astype(np.float32)
    wide /= np.maximum(np.sqrt(np.einsum("nd,nd->n", wide, wide)), 1e-30)[:, None]
    return wide


def cosine(left_ND: np.ndarray, right_MD: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines of the rows `left` and `right`, pair by pair, float64."""
    found = np.empty(len(left))
    for start in range(0, len(left), BLOCK):
        some = slice(start, start + BLOCK)
        a, b = left_ND[left[some]].astype(np.float64), right_MD[right[some]].astype(np.float64)
        products = [np.einsum("nd,nd->n", *pair) for pair in ((a, b), (a, a), (b, b))]
        found[some] = products[0] / np.sqrt(products[1] * products[2])
    return found


def product(left_ND: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
    """(N, M) fp32 products, by torch: its threads are the engine's business."""
    import torch

    return (torch.from_numpy(left_ND) @ torch.from_numpy(right_MD).T).numpy()


def train(clusters: int, sample_ND: np.ndarray) -> np.ndarray:
    """(K, D) unit centroids in fp32; fewer than `clusters` where the sample is too small for so many."""
    import faiss
    from threadpoolctl import threadpool_limits

    k = max(1, min(clusters, len(sample_ND) // SEEN))
    with threadpool_limits(1):
        seen = {"min_points_per_centroid": 1, "max_points_per_centroid": len(sample_ND)}
        means = faiss.Kmeans(sample_ND.shape[1], k, niter=ROUNDS, spherical=True, seed=0, **seen)
        means.train(unit(sample_ND))
    return np.ascontiguousarray(means.centroids, np.float32)


def assigned(vectors_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """The centroid that each vector is nearest to, int32."""
    found = np.zeros(len(vectors_ND), np.int32)
    for start in range(0, len(vectors_ND), BLOCK):
        block_BK = product(unit(vectors_ND[start : start + BLOCK]), centroids_KD)
        found[start : start + BLOCK] = block_BK.argmax(axis=1)
    return found
