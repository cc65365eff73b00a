"""Fused attention in torch: tiles of the logits, one after the other, so that memory is linear in the tokens.

Dao 2023, "FlashAttention-2", 2307.08691, algorithms 1 and 2; the tangents as Lu and Song 2024, 2410.11081, take them in
the same tiles. With S = scale Q K^T, P = softmax(S) and O = P V:

- forward keeps a running maximum, denominator and numerator of each row, and the logarithm of its denominator L;
- the tangent has P = exp(S - L) from the forward pass: with S' = scale (Q' K^T + Q K'^T) and H = P * S', O' is
  H V + P V' - rowsum(H) O;
- backward has P in the same way: with dP = dO V^T and dS = P * (dP - rowsum(dO * O)), dQ is scale dS K, dK is
  scale dS^T Q and dV is P^T dO.

A row in which every key is hidden has L = infinity, so that its P, output, tangent and gradients are 0.

What is subtracted from each logit, and each sum of two products, is a longer inner dimension of one product: S - L is
[scale Q, -L] [K, 1]^T. A tile is then gone through a few times only.
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

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        batch, heads, self.n, _ = query.shape
        self.groups = (key.shape[1], heads // key.shape[1])
        self.m = key.shape[2]
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

    def columns(self, *parts: Tensor) -> list[Tensor]:
        """Of [B, kv heads, M, ...], or several side by side: each tile of columns, made once for all rows."""
        tiles = ([x[:, :, columns].to(self.wide) for x in parts] for columns in self.over(self.m))
        return [torch.cat(tile, -1) if len(tile) > 1 else tile[0] for tile in tiles]

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Adds the mask to logits [B, kv heads, group rows, columns], in place: minus infinity where hidden."""
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
    tiles = _Tiles(query, key, mask)
    out, logsum = room_like(query), query.new_empty(query.shape[:3], dtype=tiles.wide)
    keys, values = tiles.columns(key), tiles.columns(value)
    for rows in tiles.over(tiles.n):
        q = tiles.rows(query, rows) * scale
        most = q.new_full(q.shape[:3], -math.inf)
        total, sums = torch.zeros_like(most), torch.zeros_like(q)
        for columns, k, v in zip(tiles.over(tiles.m), keys, values, strict=True):
            p = tiles.hide(q @ k.mT, rows, columns)
            above = torch.maximum(most, p.amax(-1))
            shift = above.masked_fill(above == -math.inf, 0)
            p = p.sub_(shift[..., None]).exp_()
            shrink = (most - shift).exp_()
            total = total.mul_(shrink).add_(p.sum(-1))
            sums = sums.mul_(shrink[..., None]).add_(p @ v)
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
    tiles = _Tiles(query, key, mask)
    rate = room_like(out)
    keys, values = tiles.columns(key, torch.ones_like(key[..., :1])), tiles.columns(value)
    given = ((along_query, key), (query, along_key))
    pairs = [(x, y) for x, y in given if x is not None and y is not None]  # whose products make S'
    others = tiles.columns(*(y for _, y in pairs)) if pairs else keys
    along = values if along_value is None else tiles.columns(along_value)
    for rows in tiles.over(tiles.n):
        q, last = tiles.rows(query, rows) * scale, tiles.rows(logsum, rows)[..., None]
        sums, weight, less = torch.zeros_like(q), torch.zeros_like(last), torch.cat([q, -last], -1)
        moved = torch.cat([tiles.rows(x, rows) for x, _ in pairs], -1) * scale if pairs else q
        for i, columns in enumerate(tiles.over(tiles.m)):
            p = tiles.hide(less @ keys[i].mT, rows, columns).exp_()
            if pairs:
                h = (moved @ others[i].mT).mul_(p)
                weight.add_(h.sum(-1, keepdim=True))
                sums.add_(h @ values[i])
            if along_value is not None:
                sums.add_(p @ along[i])
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
    tiles = _Tiles(query, key, mask)
    one = torch.ones_like(key[..., :1])
    keys, values = tiles.columns(key, one), tiles.columns(value, one)
    of_query = room_like(query)
    of_key, of_value = (torch.zeros_like(x, dtype=tiles.wide) for x in (key, value))
    for rows in tiles.over(tiles.n):
        q, last = tiles.rows(query, rows) * scale, tiles.rows(logsum, rows)[..., None]
        g = tiles.rows(grad, rows)
        mean = (g * tiles.rows(out, rows)).sum(-1, keepdim=True)
        sums, less, above = torch.zeros_like(q), torch.cat([q, -last], -1), torch.cat([g, -mean], -1)
        for columns, k, v in zip(tiles.over(tiles.m), keys, values, strict=True):
            p = tiles.hide(less @ k.mT, rows, columns).exp_()
            of_value[:, :, columns].add_(p.mT @ g)
            ds = (above @ v.mT).mul_(p)
            sums.add_(ds @ k[..., :-1])
            of_key[:, :, columns].add_(ds.mT @ q)
        tiles.put(of_query, rows, sums.mul_(scale))
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)
