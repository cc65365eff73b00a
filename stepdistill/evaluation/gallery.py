"""The small pictures an evaluation keeps beside its numbers: the first images, and those that fit their prompts best
and worst.

They lie in ``FOLDER/steps_N/gallery.safetensors``, one file a step count (0 for images that were there already).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.errors import UserError
from stepdistill.evaluation.rows import RowTable
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json

FIRST = 64
"""How many of the first images are kept."""
EXTREMES = 8
"""How many of the best and of the worst."""
SIDE = 128
"""Largest side of a kept picture, pixels."""
FILE = "gallery.safetensors"


@dataclass(frozen=True)
class Ranked:
    """A picture and how well it fits its prompt.

    Attributes:
        index: of the image in its suite.
        prompt: its prompt.
        score: cosine of image and prompt.
        pixels: uint8 [3, S, S].
    """

    index: int
    prompt: str
    score: float
    pixels: Tensor


@dataclass(frozen=True)
class Gallery:
    """Pictures of an evaluation at one step count, at most SIDE pixels wide.

    Attributes:
        pixels: the first images in order, uint8 [K, 3, S, S], K <= 64.
        prompts: theirs; None for a suite without.
        features: their rows, float32 [K, D]; [K, 0] where the suite's network is missing.
        best, worst: by CLIP score, the most extreme first; empty for a suite without.
    """

    pixels: Tensor
    prompts: tuple[str, ...] | None
    features: Tensor
    best: tuple[Ranked, ...] = ()
    worst: tuple[Ranked, ...] = ()

    def save(self, file: Path) -> None:
        """Write it as safetensors, prompts and scores in its header."""
        from safetensors.torch import save_file

        tensors = {"pixels": self.pixels.contiguous(), "features": self.features.contiguous()}
        about: dict[str, Any] = {"prompts": self.prompts}
        for name, ranked in (("best", self.best), ("worst", self.worst)):
            if ranked:
                tensors[name] = torch.stack([one.pixels for one in ranked])
            about[name] = [{"index": one.index, "prompt": one.prompt, "score": one.score} for one in ranked]
        with written_whole(file) as temporary:
            save_file(tensors, temporary, metadata={"about": json.dumps(about)})


def load_gallery(file: Path) -> Gallery:
    """A gallery from its file.

    Raises:
        UserError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = parse_json(opened.metadata()["about"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        ranked = {
            name: tuple(
                Ranked(pixels=pixels, **one)
                for one, pixels in zip(about[name], tensors.get(name, ()), strict=True)
            )
            for name in ("best", "worst")
        }
        prompts = about["prompts"]
        pictures = (tensors["pixels"], *(one.pixels[None] for some in ranked.values() for one in some))
        if any(each.ndim != 4 or each.shape[1] != 3 or each.dtype != torch.uint8 for each in pictures):
            raise ValueError("its pictures are no bytes [N, 3, H, W]")
        return Gallery(
            tensors["pixels"], None if prompts is None else tuple(prompts), tensors["features"], **ranked
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged ({reason}): remove it and evaluate again") from None


def load_galleries(folder: Path) -> dict[int, Gallery]:
    """The galleries of an evaluation's folder by step count, in rising order.

    Raises:
        UserError: one is damaged.
    """
    found = {
        int(match[1]): file
        for file in folder.glob(f"steps_*/{FILE}")
        if (match := re.fullmatch(r"steps_(\d+)", file.parent.name))
    }
    return {steps: load_gallery(found[steps]) for steps in sorted(found)}


class Pictures:
    """Small pictures of the images that a gallery may show: the first of all, the best and the worst of what was seen.
    It holds no more than those and a batch.

    Args:
        side: of the pictures; see :func:`small`.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self._pictures: dict[int, Tensor] = {}
        self._scores: dict[int, float] = {}

    def add(self, indices: Sequence[int], pixels: Tensor, scores: Tensor | None) -> None:
        """Take in a batch.

        Args:
            indices: of its images [B].
            pixels: uint8 [B, 3, H, W].
            scores: CLIP scores [B]; None for a suite without.
        """
        known = dict(zip(indices, [] if scores is None else scores.tolist(), strict=False))
        self._scores |= known
        extreme = {*best(self._scores), *worst(self._scores)}
        chosen = [k for k, index in enumerate(indices) if index < FIRST or index in extreme]
        pictures = small(pixels[chosen], self.side)
        self._pictures |= {indices[k]: picture.clone() for k, picture in zip(chosen, pictures, strict=True)}
        self._pictures = {i: picture for i, picture in self._pictures.items() if i < FIRST or i in extreme}
        self._scores = {i: score for i, score in self._scores.items() if i in extreme}

    def kept(self) -> dict[int, Tensor]:
        """Pictures uint8 [3, S, S] by the index of their image."""
        return self._pictures


def make_gallery(rows: RowTable, pictures: Mapping[int, Tensor], prompts: Sequence[str] | None) -> Gallery:
    """The gallery of all images.

    Args:
        rows: of all of them.
        pictures: of the first, and of the best and worst of every part of them.
        prompts: one an image; None for a suite without.
    """
    first = range(min(FIRST, rows.count))
    features = torch.empty(len(first), 0)
    if "features" in rows:
        features = _first_rows(rows.blocks("features"), len(first)).float()
    ranks: dict[str, tuple[Ranked, ...]] = {}
    if prompts is not None and "clip_score" in rows:
        scores = dict(enumerate(rows.whole("clip_score").tolist()))
        for name, order in (("best", best(scores)), ("worst", worst(scores))):
            ranks[name] = tuple(Ranked(i, prompts[i], scores[i], pictures[i]) for i in order)
    return Gallery(
        pixels=torch.stack([pictures[i] for i in first]),
        prompts=None if prompts is None else tuple(prompts[i] for i in first),
        features=features,
        **ranks,
    )


def _first_rows(blocks: Iterator[Tensor], count: int) -> Tensor:
    """The first rows of a table, without reading the others."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < count:
        parts.append(next(blocks))
    return torch.cat(parts)[:count]


def best(scores: Mapping[int, float]) -> list[int]:
    """The indices with the highest scores, the highest first; of equal ones the lower index."""
    return sorted(scores, key=lambda index: (-scores[index], index))[:EXTREMES]


def worst(scores: Mapping[int, float]) -> list[int]:
    """The indices with the lowest scores, the lowest first; of equal ones the lower index."""
    return sorted(scores, key=lambda index: (scores[index], index))[:EXTREMES]


def side_of(resolution: int) -> int:
    """The side of a gallery's pictures for images of a resolution, 0 for images of several."""
    return min(resolution or SIDE, SIDE)


def small(pixels: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, S, S] of images uint8 [B, 3, H, W]: their central squares, resized where S is another side."""
    height, width = pixels.shape[2:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    pixels = pixels[:, :, top : top + square, left : left + square]
    if square == side or not len(pixels):
        return pixels if len(pixels) else pixels.new_empty(0, 3, side, side)
    resized = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", antialias=square > side)
    return resized.round().clamp(0, 255).to(torch.uint8)
