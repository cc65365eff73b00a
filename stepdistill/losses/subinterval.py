"""Denoising when only a noisy state x_s is known: the kernel from s to t > s, and what a network should return at x_t.

Phased DMD (Fan et al. 2025, 2510.27684, eq. 11-13). x_t = a x_s + c eps with a = alpha_t / alpha_s and
c^2 = sigma_t^2 - a^2 sigma_s^2. The score of that kernel, -eps / c, has the marginal's score for its mean given x_t; so

    eps*(x_t) = sigma_t eps / c,    x0*(x_t) = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 c) eps,

which add up to x_t, and every output kind is linear in them. At s = 0 they are eps and x0 themselves. Taking x_s and
eps for them (eps - x_s as the velocity) is biased. Their variance grows as 1 / c^2 where t meets s.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.path import Output, Path, per_sample
from stepdistill.diffusion.remembered import at_time
from stepdistill.losses.batch import Batch
from stepdistill.losses.fake_score import FakeLoss
from stepdistill.networks.denoiser import Denoiser


def scaled_target(path: Path, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor, kind: Output) -> Tensor:
    """c times what a network of the given kind should return at x_t, [B, ...]: finite also where t meets s.

    Args:
        path: where x_s [B, ...] lies at s [B].
        t: the times [B], s <= t.
        eps: the kernel's noise [B, ...].
        kind: of the network's output.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.alpha_sigma(s), path.alpha_sigma(t)
    _, spread = path.kernel(s, t)
    x0 = (
        per_sample(spread / alpha_s, x_s) * x_s
        - per_sample(alpha_t * (sigma_s / alpha_s).square(), eps) * eps
    )
    return path.target(x0, per_sample(sigma_t, eps) * eps, t, kind)


def subinterval_loss(
    fake: Denoiser, x_s: Tensor, since: float, batch: Batch, clamp: float, kind: FakeLoss
) -> Tensor:
    """min(1 / c^2, clamp) |c fake(x_t) - c target|^2 at uniform times of the schedule in (since, 1), a scalar: the
    ordinary diffusion loss weighted by min(1, clamp c^2), which holds the target's variance down.

    Args:
        fake: the network, which has a graph.
        x_s: the student's states [B, C, H, W] at ``since``, without one.
        since: s, for the whole batch.
        batch: its draws and conditions.
        clamp: greatest weight; infinity leaves the ordinary loss.
        kind: whether the error is in the network's output or in the x0 read from it.
    """
    low = fake.path.unshifted(since)
    t = fake.path.shifted(low + (1 - low) * batch.draws.uniform("fake t"))
    s, eps = at_time(since, x_s), batch.draws.normal("fake eps", tuple(x_s.shape[1:]))
    ratio, spread = fake.path.kernel(s, t)
    x_t = per_sample(ratio, x_s) * x_s + per_sample(spread, x_s) * eps
    if kind == "x0":
        said, target = fake.predict(x_t, t, batch.cond).x0, scaled_target(fake.path, x_s, s, t, eps, "x0")
    else:
        said, target = fake.raw(x_t, t, batch.cond), scaled_target(fake.path, x_s, s, t, eps, fake.output)
    error = per_sample(spread, x_s) * said - target
    weight = spread.square().reciprocal().clamp_max(clamp)
    return (per_sample(weight, error) * error.square()).mean()
