"""The judge's training: what it learns from, and what it is good for afterwards.

It is to see what the embedded CLIP does not, so all but the images differs: a convolutional classifier instead of a
transformer, words and Unicode groups instead of whole captions against each other, and pictures that are turned,
zoomed, recoloured and partly covered instead of moved and noised.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.features.judge import WEIGHTS, Judge
from stepdistill.features.judge_network import JudgeNetwork, words_of
from stepdistill.features.load import load_features
from stepdistill.teacher_training import stages
from stepdistill.teacher_training.stage import Loss

TURN = 15 * math.pi / 180
ZOOM = (0.8, 1.15)
SHIFT = 0.12
"""Of half the picture's side."""
GAIN, TINT = 0.15, 0.05
"""How far the darkness of a picture, and that of a channel besides, is scaled up or down."""
COVERED = (6, 12)
"""Sides in pixels of the square that covers a part of every other picture."""
GROUP_WEIGHT = 0.5
DIMENSION = 64
NEAR = 10
"""Nearest neighbours that are compared with those of CLIP."""


@dataclass(frozen=True)
class Lessons:
    """What the judge is told of each picture.

    Attributes:
        captions: of all pictures.
        groups: their Unicode groups.
    """

    captions: Sequence[str]
    groups: Sequence[str]

    @cached_property
    def trained(self) -> Tensor:
        """Numbers of the pictures that it learns from: those that CLIP learnt from."""
        return torch.tensor(
            [i for i in range(len(self.captions)) if i % stages.HELD_OUT != stages.HELD_OUT - 1]
        )

    @cached_property
    def held_out(self) -> Tensor:
        """Numbers of the others."""
        return torch.arange(stages.HELD_OUT - 1, len(self.captions), stages.HELD_OUT)

    @cached_property
    def words(self) -> dict[str, float]:
        """The words of the captions that it learns from and the share of each, as every caption has one part."""
        share: dict[str, float] = defaultdict(float)
        for i in self.trained.tolist():
            words = words_of(self.captions[i])
            for word in words:
                share[word] += 1 / len(words) / len(self.trained)
        return dict(sorted(share.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def group_names(self) -> list[str]:
        return sorted(set(self.groups))

    @cached_property
    def group_numbers(self) -> Tensor:
        return torch.tensor([self.group_names.index(group) for group in self.groups])  # [N]

    @cached_property
    def word_shares(self) -> Tensor:
        """Of each picture, equal shares of its caption's words, [N, W]."""
        number = {word: i for i, word in enumerate(self.words)}
        shares = torch.zeros(len(self.captions), len(number))
        for row, caption in zip(shares, self.captions, strict=True):
            known = [number[word] for word in words_of(caption) if word in number]
            row[known] = 1 / max(len(known), 1)
        return shares


def build_judge(widths: Sequence[int], lessons: Lessons) -> JudgeNetwork:
    return JudgeNetwork(widths, DIMENSION, len(lessons.words), len(lessons.group_names))


def judge_loss(network: JudgeNetwork, images: Tensor, lessons: Lessons, batch: int) -> Loss:
    """Cross entropy of the caption's words, all of one softmax, and of the Unicode group."""
    trained, groups = lessons.trained, lessons.group_numbers.to(images.device)
    shares = lessons.word_shares.to(images.device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = trained[stages.draw_rows(generator, len(trained), batch)].to(images.device)
        x = varied(images[rows], generator)
        with stages.autocast(images.device):
            words, group = network.named(network(x))
        named = -(shares[rows] * words.float()).sum(1).mean()
        return named + GROUP_WEIGHT * F.nll_loss(group.float(), groups[rows])

    return loss


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] on white: turned, zoomed, moved, recoloured, and half of them partly covered."""
    count, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    turn = uniform(-TURN, TURN)
    zoom = torch.exp(uniform(math.log(ZOOM[0]), math.log(ZOOM[1])))
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    shift = uniform(-SHIFT, SHIFT, 2)
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    dark = F.grid_sample(1 - images, grid, align_corners=False)  # 0 is white, which is what lies outside
    gain = (1 + uniform(-GAIN, GAIN, 1, 1, 1)) * (1 + uniform(-TINT, TINT, 3, 1, 1))
    side = uniform(*COVERED)
    top, left = uniform(0, 1) * (height - side), uniform(0, 1) * (width - side)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])  # [B, H]
    inside_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])  # [B, W]
    covered = inside_rows[:, :, None] & inside_columns[:, None, :] & (uniform(0, 1) < 0.5)[:, None, None]
    paint = uniform(0, 2, 3, 1, 1).to(images.device)
    dark = torch.where(covered[:, None].to(images.device), paint, dark * gain.to(images.device))
    return (1 - dark).clamp(-1, 1)


def save_judge(network: JudgeNetwork, widths: Sequence[int], lessons: Lessons, folder: Path) -> None:
    """One file, in float16, with all that is needed to read it in its header."""
    state = {name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}
    config = {
        "widths": list(widths),
        "dimension": DIMENSION,
        "groups": lessons.group_names,
        "words": {word: float(f"{share:.6g}") for word, share in lessons.words.items()},
    }
    save_file(state, folder / WEIGHTS, metadata={"config": json.dumps(config)})


@torch.no_grad()
def judge_measures(judge: Judge, images: Tensor, lessons: Lessons) -> dict[str, float]:
    """What it knows of the pictures held out of its training.

    Args:
        images: all of them, [N, 3, H, W] in [-1, 1].
    """
    held = lessons.held_out
    pixels = (images[held.to(images.device)] + 1) / 2
    features = judge.features(pixels)
    group = judge.groups_of(features).argmax(1).cpu()
    every = judge.fits(features, lessons.captions).cpu()  # [H, N]
    own = every.gather(1, held[:, None])
    words = judge.words_of(features).cpu()
    shares = lessons.word_shares[held]
    known = shares.sum(1) > 0
    first = shares[known].gather(1, words[known].argmax(1, keepdim=True)) > 0
    return {
        "held_out": float(len(held)),
        "group": float((group == lessons.group_numbers[held]).float().mean()),
        "first_word": float(first.float().mean()),
        "retrieval": float(((every > own).sum(1) < 5).float().mean()),
        **_agreement_with_clip(
            pixels, features.cpu(), own[:, 0], [lessons.captions[i] for i in held.tolist()]
        ),
    }


def _agreement_with_clip(
    pixels: Tensor, features: Tensor, fit: Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """How far the judge and the embedded CLIP say the same of pictures that neither has learnt from."""
    clip = load_features("emoji", device=pixels.device)
    theirs = clip.images((255 * pixels).round().byte()).cpu()
    cosine = (theirs * clip.texts(captions).cpu()).sum(1)
    others = ~torch.eye(len(pixels), dtype=torch.bool)
    mine, its = ((x @ x.T).masked_fill(~others, -1) for x in (features, theirs))
    near = [x.topk(min(NEAR, len(x) - 1)).indices for x in (mine, its)]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    return {
        "pairs": rank_correlation(mine[others], its[others]),
        "near": float(shared.float().mean()),
        "captions": rank_correlation(fit, cosine),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two rows of numbers without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
