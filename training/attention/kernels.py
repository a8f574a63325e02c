"""Triton kernels of `fused`: softmax attention with online softmax, forward and backward, over tiles of a schedule.

One program computes one tile of one head. Which keys a row sees are two numbers of that row (`low`, `high`), so one
kernel serves documents, causal, prefix and cross-attention. No atomics: sums have a fixed order, and what a masked
document holds enters as an exact zero, so no document feels another by a bit (unless it holds inf or NaN: 0 · inf).
Scores are kept in units of log2 (exp2 is the GPU's own instruction). FlashAttention-2: arXiv 2307.08691.

Legend: R rows of the tile, C columns of a step, H width of a head, E the power of two that holds it. `x_t`, `x_n`:
strides of a token and a head.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LEAST = tl.constexpr(-1e30)  # stands for -inf, which would give NaN as a difference


@triton.jit
def _load(x, rows, end, x_t, H: tl.constexpr, E: tl.constexpr):
    """Rows of one head, (rows, E); zeros past `end` and past H."""
    columns = tl.arange(0, E)
    there = (rows < end)[:, None] & (columns < H)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * x_t + columns[None, :], mask=there, other=0.0)


@triton.jit
def _store(x, value, rows, end, x_t, H: tl.constexpr, E: tl.constexpr):
    columns = tl.arange(0, E)
    there = (rows < end)[:, None] & (columns < H)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * x_t + columns[None, :], value.to(x.dtype.element_ty), mask=there)


@triton.jit
def _dot(a, b):
    # float32 in three products of 19 bits: plain float32 has no tensor core, and its tiles spill kilobytes a thread.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _whole(first, end, C: tl.constexpr):
    """Where whole steps of C end; the rest, at most half a step, goes in steps of 16."""
    rest = (end - first) % C
    return tl.where(rest > C // 2, end, end - rest)


@triton.jit
def _attend(q, k, v, low, high, col, key1, k_t, v_t, scale, best, total, out,
            H: tl.constexpr, E: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """One step of the online softmax over C keys."""
    cols = col + tl.arange(0, C)
    score = _dot(q, tl.trans(_load(k, cols, key1, k_t, H, E))) * scale
    seen = (cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None])
    score = tl.where(seen, score, LEAST)
    higher = tl.maximum(best, tl.max(score, 1))
    weight = tl.where(seen, tl.exp2(score - higher[:, None]), 0.0)
    shrink = tl.exp2(best - higher)
    value = _load(v, cols, key1, v_t, H, E)
    out = out * shrink[:, None] + _dot(weight.to(value.dtype), value)
    return higher, total * shrink + tl.sum(weight, 1), out


@triton.jit(do_not_specialize=["tokens"])
def forward(q, k, v, o, lse, low, high, tiles, tokens, scale, q_t, q_n, k_t, k_n, v_t, v_n, o_t, o_n,
            H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """`o` and `lse` (N, T; log2 of the sum of exponentials) of a tile's rows."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    row0, row1, key0, key1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows = row0 + tl.arange(0, R)
    lows, highs = tl.load(low + rows, mask=rows < row1, other=0), tl.load(high + rows, mask=rows < row1, other=0)
    queries = _load(q + head * q_n, rows, row1, q_t, H, E)
    best, total, out = tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32), tl.zeros([R, E], tl.float32)
    whole = _whole(key0, key1, C)
    for col in range(key0, whole, C):
        best, total, out = _attend(queries, k + head * k_n, v + head * v_n, lows, highs, col, key1, k_t, v_t, scale,
                                   best, total, out, H, E, C)  # fmt: skip
    for col in range(whole, key1, 16):
        best, total, out = _attend(queries, k + head * k_n, v + head * v_n, lows, highs, col, key1, k_t, v_t, scale,
                                   best, total, out, H, E, 16)  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # rows past the end
    _store(o + head * o_n, out / total[:, None], rows, row1, o_t, H, E)
    tl.store(lse + head.to(tl.int64) * tokens + rows, best + tl.log2(total), mask=rows < row1)


@triton.jit(do_not_specialize=["tokens"])
def backward_short(q, k, v, do, dq, dk, dv, lse, low, high, tiles, tokens, scale, q_t, q_n, k_t, k_n, v_t, v_n, d_t,
                   d_n, g_t, g_n, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """All three gradients of a tile that holds whole segments: its scores are computed once, and nothing is looped."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    row0, row1, key0, key1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows, cols = row0 + tl.arange(0, R), key0 + tl.arange(0, R)
    lows, highs = tl.load(low + rows, mask=rows < row1, other=0), tl.load(high + rows, mask=rows < row1, other=0)
    sums = tl.load(lse + head.to(tl.int64) * tokens + rows, mask=rows < row1, other=0.0)
    queries, keys = _load(q + head * q_n, rows, row1, q_t, H, E), _load(k + head * k_n, cols, key1, k_t, H, E)
    seen = (cols[None, :] >= lows[:, None]) & (cols[None, :] < highs[:, None])
    weight = tl.where(seen, tl.exp2(_dot(queries, tl.trans(keys)) * scale - sums[:, None]), 0.0)
    given = _load(do + head * d_n, rows, row1, d_t, H, E)
    _store(dv + head * g_n, _dot(tl.trans(weight.to(given.dtype)), given), cols, key1, g_t, H, E)
    slope = _dot(given, tl.trans(_load(v + head * v_n, cols, key1, v_t, H, E)))
    slope = weight * (slope - tl.sum(weight * slope, 1)[:, None]) * (scale * 0.6931471805599453)
    slope = slope.to(keys.dtype)
    _store(dq + head * g_n, _dot(slope, keys), rows, row1, g_t, H, E)
    _store(dk + head * g_n, _dot(tl.trans(slope), queries), cols, key1, g_t, H, E)


@triton.jit
def _query_slope(q, k, v, given, low, high, sums, delta, col, key1, k_t, v_t, scale, out,
                 H: tl.constexpr, E: tl.constexpr, C: tl.constexpr):  # fmt: skip
    cols = col + tl.arange(0, C)
    keys = _load(k, cols, key1, k_t, H, E)
    seen = (cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None])
    weight = tl.where(seen, tl.exp2(_dot(q, tl.trans(keys)) * scale - sums[:, None]), 0.0)
    slope = weight * (_dot(given, tl.trans(_load(v, cols, key1, v_t, H, E))) - delta[:, None])
    return out + _dot(slope.to(keys.dtype), keys)


@triton.jit(do_not_specialize=["tokens"])
def backward_queries(q, k, v, o, do, dq, lse, delta, low, high, tiles, tokens, scale, q_t, q_n, k_t, k_n, v_t, v_n,
                     o_t, o_n, d_t, d_n, g_t, g_n,
                     H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """`dq` of a tile's rows, and their `delta` = Σ o · do, (N, T), which `backward_keys` needs next."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    row0, row1, key0, key1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows = row0 + tl.arange(0, R)
    lows, highs = tl.load(low + rows, mask=rows < row1, other=0), tl.load(high + rows, mask=rows < row1, other=0)
    at = head.to(tl.int64) * tokens + rows
    sums = tl.load(lse + at, mask=rows < row1, other=0.0)
    queries, given = _load(q + head * q_n, rows, row1, q_t, H, E), _load(do + head * d_n, rows, row1, d_t, H, E)
    deltas = tl.sum(_load(o + head * o_n, rows, row1, o_t, H, E).to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + at, deltas, mask=rows < row1)
    out, whole = tl.zeros([R, E], tl.float32), _whole(key0, key1, C)
    for col in range(key0, whole, C):
        out = _query_slope(queries, k + head * k_n, v + head * v_n, given, lows, highs, sums, deltas, col, key1, k_t,
                           v_t, scale, out, H, E, C)  # fmt: skip
    for col in range(whole, key1, 16):
        out = _query_slope(queries, k + head * k_n, v + head * v_n, given, lows, highs, sums, deltas, col, key1, k_t,
                           v_t, scale, out, H, E, 16)  # fmt: skip
    _store(dq + head * g_n, out * (scale * 0.6931471805599453), rows, row1, g_t, H, E)


@triton.jit
def _key_slopes(q, do, keys, values, low, high, lse, delta, rows0, row1, cols, q_t, d_t, scale, dk, dv,
                H: tl.constexpr, E: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """One step over C queries; everything is computed transposed, (keys, queries), so that no tile is turned."""
    rows = rows0 + tl.arange(0, C)
    lows, highs = tl.load(low + rows, mask=rows < row1, other=0), tl.load(high + rows, mask=rows < row1, other=0)
    sums, deltas = tl.load(lse + rows, mask=rows < row1, other=0.0), tl.load(delta + rows, mask=rows < row1, other=0.0)
    queries, given = _load(q, rows, row1, q_t, H, E), _load(do, rows, row1, d_t, H, E)
    seen = (cols[:, None] >= lows[None, :]) & (cols[:, None] < highs[None, :])
    weight = tl.where(seen, tl.exp2(_dot(keys, tl.trans(queries)) * scale - sums[None, :]), 0.0)
    dv += _dot(weight.to(given.dtype), given)
    slope = weight * (_dot(values, tl.trans(given)) - deltas[None, :])
    return dk + _dot(slope.to(queries.dtype), queries), dv


@triton.jit(do_not_specialize=["tokens"])
def backward_keys(q, k, v, do, dk, dv, lse, delta, low, high, tiles, tokens, scale, q_t, q_n, k_t, k_n, v_t, v_n, d_t,
                  d_n, g_t, g_n, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """`dk` and `dv` of a tile of keys, over the queries that see it."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    key0, key1, row0, row1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    cols, line = key0 + tl.arange(0, R), head.to(tl.int64) * tokens
    keys, values = _load(k + head * k_n, cols, key1, k_t, H, E), _load(v + head * v_n, cols, key1, v_t, H, E)
    dks, dvs = tl.zeros([R, E], tl.float32), tl.zeros([R, E], tl.float32)
    whole = _whole(row0, row1, C)
    for row in range(row0, whole, C):
        dks, dvs = _key_slopes(q + head * q_n, do + head * d_n, keys, values, low, high, lse + line, delta + line, row,
                               row1, cols, q_t, d_t, scale, dks, dvs, H, E, C)  # fmt: skip
    for row in range(whole, row1, 16):
        dks, dvs = _key_slopes(q + head * q_n, do + head * d_n, keys, values, low, high, lse + line, delta + line, row,
                               row1, cols, q_t, d_t, scale, dks, dvs, H, E, 16)  # fmt: skip
    _store(dk + head * g_n, dks * (scale * 0.6931471805599453), cols, key1, g_t, H, E)
    _store(dv + head * g_n, dvs, cols, key1, g_t, H, E)
