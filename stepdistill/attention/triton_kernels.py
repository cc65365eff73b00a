"""Fused attention in Triton: the algorithm of ``tiled``, one program for each tile of rows or of columns.

Heads are padded to a power of two, tokens to whole tiles; strides are free but for the last, so that heads cut out of
[B, N, heads D] are read where they lie. Logits and sums are float32. Products of float32 are as exact as float32's, on
tensor cores or off them (``triton_launch.Shape``); probabilities are rounded to the inputs' type before their products.
Nothing is added atomically: every run gives the same bits. Keys serve their whole group of heads in one program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _load(base, index, stride, count, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a matrix [count, D] as [rows, WIDTH]; zeros outside. WHOLE: no row is outside."""
    column = tl.arange(0, WIDTH)
    places = base + index[:, None] * stride + column[None, :]
    if WHOLE and D == WIDTH:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(index[:, None] < count) & (column[None, :] < D), other=0.0)
    return tile


@triton.jit
def _store(base, index, stride, count, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    places = base + index[:, None] * stride + column[None, :]
    inside = (index[:, None] < count) & (column[None, :] < D)
    tl.store(places, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, total, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b with a and b rounded to TYPE."""
    return tl.dot(a.to(TYPE), b.to(TYPE), total, input_precision=PRECISION)


@triton.jit
def _logits(
    product,
    scale,
    mask,
    row,
    column,
    row_stride,
    column_stride,
    N,
    M,
    MASKED: tl.constexpr,
    ADDED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Logits in powers of two; minus infinity where hidden or past the last key. ``row`` and ``column`` are spread
    against each other, either way round. MASKED: by a mask, which is added to the logits where ADDED."""
    logits = product * (scale * LOG2E)
    if MASKED:
        inside = (row < N) & (column < M)
        places = mask + row * row_stride + column * column_stride
        if ADDED:
            logits += tl.load(places, mask=inside, other=-INFINITY).to(tl.float32) * LOG2E
        else:
            logits = tl.where(tl.load(places, mask=inside, other=0) != 0, logits, -INFINITY)
    elif not WHOLE:
        logits = tl.where(column < M, logits, -INFINITY)
    return logits


@triton.jit
def forward(
    Q, K, V, MASK, OUT, LOGSUM, scale, heads, group, N, M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_n, m_m,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, ADDED: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    K += batch * k_b + head // group * k_h
    V += batch * v_b + head // group * v_h
    MASK += batch * m_b + head * m_h
    q = _load(Q + batch * q_b + head * q_h, row, q_n, N, D, WIDTH, False)
    most = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, M, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        k = _load(K, column, k_n, M, D, WIDTH, WHOLE)
        product = _dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), TYPE, PRECISION)
        p = _logits(product, scale, MASK, row[:, None], column[None, :], m_n, m_m, N, M, MASKED, ADDED, WHOLE)
        above = tl.maximum(most, tl.max(p, 1))
        shift = above
        if MASKED:
            shift = tl.where(above == -INFINITY, 0.0, above)
        p = tl.exp2(p - shift[:, None])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(p, 1)
        v = _load(V, column, v_n, M, D, WIDTH, WHOLE)
        sums = _dot(p, v, sums * shrink[:, None], TYPE, PRECISION)
        most = above
    logsum = most + tl.log2(total)
    if MASKED:
        logsum = tl.where(total > 0, logsum, INFINITY)
        total = tl.where(total > 0, total, 1.0)
    _store(OUT + batch * o_b + head * o_h, row, o_n, N, sums / total[:, None], D, WIDTH)
    tl.store(LOGSUM + tl.program_id(1).to(tl.int64) * N + row, logsum / LOG2E, mask=row < N)


@triton.jit
def tangent(
    Q, K, V, MASK, OUT, LOGSUM, TQ, TK, TV, RATE, scale, heads, group, N, M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_n, m_m,
    tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, ADDED: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ALONG_Q: tl.constexpr, ALONG_K: tl.constexpr, ALONG_V: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    K += batch * k_b + head // group * k_h
    V += batch * v_b + head // group * v_h
    TK += batch * tk_b + head // group * tk_h
    TV += batch * tv_b + head // group * tv_h
    MASK += batch * m_b + head * m_h
    q = _load(Q + batch * q_b + head * q_h, row, q_n, N, D, WIDTH, False)
    if ALONG_Q:
        tq = _load(TQ + batch * tq_b + head * tq_h, row, tq_n, N, D, WIDTH, False)
    last = tl.load(LOGSUM + tl.program_id(1).to(tl.int64) * N + row, mask=row < N, other=INFINITY) * LOG2E
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, M, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        k = tl.trans(_load(K, column, k_n, M, D, WIDTH, WHOLE))
        product = _dot(q, k, tl.zeros([ROWS, COLUMNS], tl.float32), TYPE, PRECISION)
        p = _logits(product, scale, MASK, row[:, None], column[None, :], m_n, m_m, N, M, MASKED, ADDED, WHOLE)
        p = tl.exp2(p - last[:, None])
        if ALONG_Q or ALONG_K:
            h = tl.zeros([ROWS, COLUMNS], tl.float32)
            if ALONG_Q:
                h = _dot(tq, k, h, TYPE, PRECISION)
            if ALONG_K:
                h = _dot(q, tl.trans(_load(TK, column, tk_n, M, D, WIDTH, WHOLE)), h, TYPE, PRECISION)
            h = p * h * scale
            weight += tl.sum(h, 1)
            sums = _dot(h, _load(V, column, v_n, M, D, WIDTH, WHOLE), sums, TYPE, PRECISION)
        if ALONG_V:
            sums = _dot(p, _load(TV, column, tv_n, M, D, WIDTH, WHOLE), sums, TYPE, PRECISION)
    out = _load(OUT + batch * o_b + head * o_h, row, o_n, N, D, WIDTH, False)
    rate = sums - weight[:, None] * out.to(tl.float32)
    _store(RATE + batch * o_b + head * o_h, row, o_n, N, rate, D, WIDTH)


@triton.jit
def of_queries(
    Q, K, V, MASK, OUT, LOGSUM, G, MEAN, DQ, scale, heads, group, N, M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_n, m_m,
    g_b, g_h, g_n, dq_b, dq_h, dq_n,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, ADDED: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and the mean of dP in each row, which that of keys takes."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    K += batch * k_b + head // group * k_h
    V += batch * v_b + head // group * v_h
    MASK += batch * m_b + head * m_h
    q = _load(Q + batch * q_b + head * q_h, row, q_n, N, D, WIDTH, False)
    g = _load(G + batch * g_b + head * g_h, row, g_n, N, D, WIDTH, False)
    out = _load(OUT + batch * o_b + head * o_h, row, o_n, N, D, WIDTH, False)
    mean = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    place = tl.program_id(1).to(tl.int64) * N + row
    tl.store(MEAN + place, mean, mask=row < N)
    last = tl.load(LOGSUM + place, mask=row < N, other=INFINITY) * LOG2E
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, M, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        k = _load(K, column, k_n, M, D, WIDTH, WHOLE)
        v = _load(V, column, v_n, M, D, WIDTH, WHOLE)
        product = _dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), TYPE, PRECISION)
        p = _logits(product, scale, MASK, row[:, None], column[None, :], m_n, m_m, N, M, MASKED, ADDED, WHOLE)
        p = tl.exp2(p - last[:, None])
        ds = _dot(g, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32), TYPE, PRECISION)
        ds = p * (ds - mean[:, None])
        sums = _dot(ds, k, sums, TYPE, PRECISION)
    _store(DQ + batch * dq_b + head * dq_h, row, dq_n, N, sums * scale, D, WIDTH)


@triton.jit
def of_keys(
    Q, K, V, MASK, LOGSUM, G, MEAN, DK, DV, scale, heads, group, N, M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_n, m_m,
    g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, ADDED: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, from logits [COLUMNS, ROWS]."""
    batch = (tl.program_id(1) // (heads // group)).to(tl.int64)
    shared = (tl.program_id(1) % (heads // group)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = _load(K + batch * k_b + shared * k_h, column, k_n, M, D, WIDTH, False)
    v = _load(V + batch * v_b + shared * v_h, column, v_n, M, D, WIDTH, False)
    of_k = tl.zeros([COLUMNS, WIDTH], tl.float32)
    of_v = tl.zeros([COLUMNS, WIDTH], tl.float32)
    for member in range(0, group):
        head = shared * group + member
        for start in range(0, N, ROWS):
            row = start + tl.arange(0, ROWS)
            place = (batch * heads + head) * N + row
            last = tl.load(LOGSUM + place, mask=row < N, other=INFINITY) * LOG2E
            mean = tl.load(MEAN + place, mask=row < N, other=0.0)
            q = _load(Q + batch * q_b + head * q_h, row, q_n, N, D, WIDTH, WHOLE)
            g = _load(G + batch * g_b + head * g_h, row, g_n, N, D, WIDTH, WHOLE)
            product = _dot(k, tl.trans(q), tl.zeros([COLUMNS, ROWS], tl.float32), TYPE, PRECISION)
            # Columns past the last key are not written, and rows past the last query have L = infinity.
            p = _logits(
                product, scale, MASK + batch * m_b + head * m_h, row[None, :], column[:, None], m_n, m_m, N, M,
                MASKED, ADDED, True,
            )  # fmt: skip
            p = tl.exp2(p - last[None, :])
            of_v = _dot(p, g, of_v, TYPE, PRECISION)
            ds = _dot(v, tl.trans(g), tl.zeros([COLUMNS, ROWS], tl.float32), TYPE, PRECISION)
            ds = p * (ds - mean[None, :])
            of_k = _dot(ds, q, of_k, TYPE, PRECISION)
    _store(DK + batch * dk_b + shared * dk_h, column, dk_n, M, of_k * scale, D, WIDTH)
    _store(DV + batch * dv_b + shared * dv_h, column, dv_n, M, of_v, D, WIDTH)
