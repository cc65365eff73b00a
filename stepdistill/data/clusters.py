"""Prompts of one kind together: equal clusters of what a teacher's text encoders say of them.

Parts for several students (Song et al. 2024, "Multi-student Diffusion Distillation for Better One-step Generators",
2410.23274) that each know one region of the prompts. The paper clusters; equal sizes are a start value of ours [R], as
each student has as many updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.data.conditions import Conditions
from stepdistill.diffusion.draws import generator_for
from stepdistill.families.condition import Condition
from stepdistill.networks.teacher import PipelineTeacher

STARTS, ROUNDS = 8, 100
"""Of Lloyd's algorithm: how often it starts, and rounds of each, at most."""
AT_ONCE, WIDTH = 1024, 256
"""Prompts whose conditions are in memory together, and numbers of each that stay there: a million have one GB."""


def features_of(cond: Condition) -> Tensor:
    """One row of numbers for each prompt [B, D]: the mean over its tokens of each thing that a network is told, at one
    length, side by side; padding that a mask names does not count."""
    masks = {value.shape: value for name, value in cond.tensors.items() if name.endswith("mask")}
    rows = []
    for name, value in cond.tensors.items():
        if not value.is_floating_point() or name.endswith("mask"):
            continue
        if value.ndim > 2:
            mask = masks.get(value.shape[:2], torch.ones(value.shape[:2])).float()
            mask = mask.view(*mask.shape, *[1] * (value.ndim - 2))
            value = ((value.float() * mask).sum(1) / mask.sum(1).clamp_min(1)).flatten(1)
        rows.append(F.normalize(value.float().view(len(value), -1), dim=1))
    return torch.cat(rows, 1)


def prompt_features(teacher: PipelineTeacher, prompts: Sequence[str]) -> Tensor:
    """:func:`features_of` all prompts, centred and at length 1; more numbers than WIDTH are projected at random, which
    keeps distances (Johnson and Lindenstrauss 1984). What is encoded stays in the cache, where a training finds it.

    Returns:
        [P, D], D at most WIDTH.
    """
    known = Conditions(teacher, prompts)
    known.rows.make()
    parts = torch.arange(len(prompts)).split(AT_ONCE)
    found = torch.cat([narrow(features_of(known.take(own))) for own in parts])
    return F.normalize(found - found.mean(0), dim=1)


def narrow(features: Tensor) -> Tensor:
    """Features [B, D] as they are, or [B, WIDTH] where they are wider."""
    width = features.shape[1]
    if width <= WIDTH:
        return features
    onto = torch.randn(width, WIDTH, generator=generator_for("clusters", "projection", width))
    narrowed: Tensor = features @ onto / WIDTH**0.5
    return narrowed


def balanced_clusters(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """K-means (Lloyd 1982, from centres drawn as Arthur and Vassilvitskii 2007 do) whose clusters hold ceil(P / K)
    points at most; the best of STARTS by the sum of squares.

    Args:
        features: [P, D].
        count: K, P at most.
        seed: of the first centres.

    Returns:
        The cluster of each point [P], from 0 to K - 1.
    """
    starts = (generator_for("clusters", seed, start) for start in range(STARTS))
    found = (_lloyd(features, count, draw) for draw in starts)
    return min(found, key=lambda clusters: sum_of_squares(features, clusters))


def sum_of_squares(features: Tensor, found: Tensor) -> float:
    """Of the distances of points [P, D] from the middle of their cluster [P]."""
    parts = (features[found == k] for k in found.unique().tolist())
    return sum(float((own - own.mean(0)).square().sum()) for own in parts)


def _lloyd(features: Tensor, count: int, draw: torch.Generator) -> Tensor:
    centres = features[torch.randint(len(features), (1,), generator=draw)]
    for _ in range(count - 1):
        far = torch.cdist(features, centres).min(1).values.square()
        weights = far if bool((far > 0).any()) else torch.ones_like(far)
        centres = torch.cat([centres, features[torch.multinomial(weights, 1, generator=draw)]])
    found = torch.full((len(features),), -1)
    for _ in range(ROUNDS):
        new = _shared_out(torch.cdist(features, centres))
        if torch.equal(new, found):
            break
        found = new
        centres = torch.stack([features[found == k].mean(0) for k in range(count)])
    return found


def _shared_out(distances: Tensor) -> Tensor:
    """The cluster of each point by its distances [P, K], none of more than ceil(P / K): each asks for its nearest, a
    full one keeps its nearest, and the others ask for their next (a stable matching: Gale and Shapley 1962)."""
    points, count = distances.shape
    room, wishes = -(-points // count), distances.argsort(dim=1, stable=True)
    asked = torch.zeros(points, dtype=torch.long)
    while True:
        found = wishes.gather(1, asked[:, None])[:, 0]
        refused = []
        for k in range(count):
            own = (found == k).nonzero()[:, 0]
            refused.append(own[distances[own, k].argsort(stable=True)[room:]])
        sent = torch.cat(refused)
        if not len(sent):
            return found
        asked[sent] += 1
