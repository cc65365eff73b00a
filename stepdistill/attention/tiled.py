"""Fused attention in torch: tiles of the logits, one after the other, so that memory is linear in the tokens.

Dao 2023, "FlashAttention-2", 2307.08691, algorithms 1 and 2; the tangents as Lu and Song 2024, 2410.11081, take them in
the same tiles. With S = scale Q K^T, P = softmax(S) and O = P V:

- forward keeps a running maximum, denominator and numerator of each row, and the logarithm of its denominator L;
- the tangent has P = exp(S - L) from the forward pass: with S' = scale (Q' K^T + Q K'^T) and H = P * S', O' is
  H V + P V' - rowsum(H) O;
- backward has P in the same way: with dP = dO V^T and dS = P * (dP - rowsum(dO * O)), dQ is scale dS K, dK is
  scale dS^T Q and dV is P^T dO.

A row in which every key is hidden has L = infinity, so that its P, output, tangent and gradients are 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 2**20
"""Logits held at once, over batch and heads: a few MB of float32, which a processor's cache holds."""


def room_like(x: Tensor) -> Tensor:
    """Room for a result, laid out like x where its heads lie in one piece."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else x.new_empty(x.shape)


class _Tiles:
    """Rows of queries [B, kv heads, group rows, D] and columns of keys [B, kv heads, columns, D], in float32 or wider.

    Heads that share a key head are rows of one product.
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        batch, heads, self.n, _ = query.shape
        self.groups = (key.shape[1], heads // key.shape[1])
        self.m = key.shape[2]
        self.scale = scale
        self.wide = torch.promote_types(query.dtype, torch.float32)
        edge = math.isqrt(TILE // (batch * heads))
        self.edge = 2 ** max(5, edge.bit_length() - 1) if edge else 32
        self.hidden = self.added = None
        if mask is not None:
            spread = (mask.logical_not() if mask.dtype == torch.bool else mask).expand(
                batch, heads, self.n, self.m
            )
            if mask.dtype == torch.bool:
                self.hidden = spread.unflatten(1, self.groups)
            else:
                self.added = spread.unflatten(1, self.groups)

    def over(self, length: int) -> list[slice]:
        """Tiles of a length."""
        return [slice(i, min(i + self.edge, length)) for i in range(0, length, self.edge)]

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """Of [B, heads, N, ...]: [B, kv heads, group rows, ...]."""
        tile: Tensor = x.unflatten(1, self.groups)[:, :, :, rows]
        return tile.flatten(2, 3).to(self.wide)

    def put(self, x: Tensor, rows: slice, tile: Tensor) -> None:
        """Writes a tile of :meth:`rows`."""
        part = x.unflatten(1, self.groups)[:, :, :, rows]
        part.copy_(tile.view(part.shape))

    def columns(self, x: Tensor, columns: slice) -> Tensor:
        """Of [B, kv heads, M, D]."""
        return x[:, :, columns].to(self.wide)

    def logits(self, query: Tensor, key: Tensor, rows: slice, columns: slice) -> Tensor:
        """[B, kv heads, group rows, columns]; minus infinity where hidden."""
        logits = (query @ key.mT).mul_(self.scale)
        if self.hidden is not None:
            hidden = self.hidden[:, :, :, rows, columns]
            logits.view(hidden.shape).masked_fill_(hidden, -math.inf)
        if self.added is not None:
            added = self.added[:, :, :, rows, columns]
            logits.view(added.shape).add_(added)
        return logits


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, heads, N, D], and the logarithm of each row's denominator [B, heads, N], in float32 or wider."""
    tiles = _Tiles(query, key, mask, scale)
    out, logsum = room_like(query), query.new_empty(query.shape[:3], dtype=tiles.wide)
    for rows in tiles.over(tiles.n):
        q = tiles.rows(query, rows)
        most = q.new_full(q.shape[:3], -math.inf)
        total, sums = torch.zeros_like(most), torch.zeros_like(q)
        for columns in tiles.over(tiles.m):
            p = tiles.logits(q, tiles.columns(key, columns), rows, columns)
            above = torch.maximum(most, p.amax(-1))
            shift = above.masked_fill(above == -math.inf, 0)
            p = p.sub_(shift[..., None]).exp_()
            shrink = (most - shift).exp_()
            total = total.mul_(shrink).add_(p.sum(-1))
            sums = sums.mul_(shrink[..., None]).add_(p @ tiles.columns(value, columns))
            most = above
        seen = total > 0
        tiles.put(out, rows, sums / total.where(seen, 1.0)[..., None])
        tiles.put(logsum, rows, (most + total.log()).where(seen, math.inf))
    return out, logsum


def tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    *tangents: Tensor | None,
) -> Tensor:
    """The output's tangent along those of query, key and value; None is a tangent of zeros."""
    along_query, along_key, along_value = tangents
    tiles = _Tiles(query, key, mask, scale)
    rate = room_like(out)
    for rows in tiles.over(tiles.n):
        q, last = tiles.rows(query, rows), tiles.rows(logsum, rows)[..., None]
        sums, weight = torch.zeros_like(q), torch.zeros_like(last)
        for columns in tiles.over(tiles.m):
            k, v = tiles.columns(key, columns), tiles.columns(value, columns)
            p = tiles.logits(q, k, rows, columns).sub_(last).exp_()
            if along_query is not None or along_key is not None:
                h = torch.zeros_like(p)
                if along_query is not None:
                    h.add_(tiles.rows(along_query, rows) @ k.mT)
                if along_key is not None:
                    h.add_(q @ tiles.columns(along_key, columns).mT)
                h.mul_(p).mul_(scale)
                weight.add_(h.sum(-1, keepdim=True))
                sums.add_(h @ v)
            if along_value is not None:
                sums.add_(p @ tiles.columns(along_value, columns))
        tiles.put(rate, rows, sums.sub_(weight * tiles.rows(out, rows)))
    return rate


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of the output."""
    tiles = _Tiles(query, key, mask, scale)
    of_query = room_like(query)
    of_key, of_value = (torch.zeros_like(x, dtype=tiles.wide) for x in (key, value))
    for rows in tiles.over(tiles.n):
        q, last = tiles.rows(query, rows), tiles.rows(logsum, rows)[..., None]
        g = tiles.rows(grad, rows)
        mean = (g * tiles.rows(out, rows)).sum(-1, keepdim=True)
        sums = torch.zeros_like(q)
        for columns in tiles.over(tiles.m):
            k, v = tiles.columns(key, columns), tiles.columns(value, columns)
            p = tiles.logits(q, k, rows, columns).sub_(last).exp_()
            of_value[:, :, columns].add_(p.mT @ g)
            ds = (g @ v.mT).sub_(mean).mul_(p).mul_(scale)
            sums.add_(ds @ k)
            of_key[:, :, columns].add_(ds.mT @ q)
        tiles.put(of_query, rows, sums)
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)
