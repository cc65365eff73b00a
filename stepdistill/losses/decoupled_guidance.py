"""The two parts of a guided score difference, each at a time of its own.

Liu et al. 2025, "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield", 2511.22677: with
guidance g on the real score, x0_fake - x0_real^g = (x0_fake - x0_real) - (g - 1) (x0_real - x0_null). The first part
matches distributions and holds the student in place; the second turns it into a few-step model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.guidance import in_interval
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.fake_score import FakeScoreOptions
from stepdistill.networks.teacher import Teacher


@torch.no_grad()
def augmentation(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(g - 1) (x0_real - x0_null) and x0_real, unguided, at x_t [B, C, H, W] and t [B]: each [B, C, H, W]."""
    plain = teacher.predict(x_t, t, cond).x0
    return teacher.predict(x_t, t, cond, guidance=guidance).x0 - plain, plain


@torch.no_grad()
def augmentation_field(
    teacher: Teacher, x: Tensor, batch: Batch, options: FakeScoreOptions, t_max: float
) -> Tensor:
    """The augmentation over mean|x - x0_real|, [B, C, H, W]: where guidance wants x [B, C, H, W] to move to.

    Its time is uniform on the schedule below ``t_max``, where the student was called: noisier ones would plan anew
    what is settled there. Both parts have a normaliser of their own, or this one, the larger, would decide alone; its
    floor of 0.1 is that of CDM (2605.06376), for at small t teacher and x agree.
    """
    scale, (low, high) = options.score_scale, options.score_times
    if scale == 1.0:
        return torch.zeros_like(x)
    path, last = teacher.path, teacher.path.unshifted(t_max)
    t = path.shifted(batch.draws.uniform("guidance t", min(low, last), min(high, last)))
    x_t = path.noised(x, batch.draws.normal("guidance eps", tuple(x.shape[1:])), t)
    guidance = in_interval(scale, t, *options.score_interval)
    towards, plain = augmentation(teacher, x_t, t, batch.cond, guidance)
    size = (x - plain).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return towards / size.clamp_min(0.1)
