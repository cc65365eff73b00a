"""The LCM loss in plain diffusers, at the embedded teacher.

Written from Luo et al. 2023, 2310.04378, with what diffusers' training script calls: two calls of the teacher for
guidance, a DDIM step on a table of 50 times, an averaged target network, pseudo-Huber, LCMScheduler's scalings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import StableDiffusionPipeline
from peer import Ours, Pair, Update
from torch import Tensor, nn

GRID, LEAST, MOST, HUBER, DECAY = 50, 3.0, 15.0, 1e-3, 0.95


def pairs(batch: int) -> Iterator[Pair]:
    options = {
        "guidance_range": (LEAST, MOST),
        "target_decay": DECAY,
        "huber": HUBER,
        "pairs": batch,
        "pair_steps": 2,
    }
    ours = Ours("lcm", "emoji", batch, options)
    number = ours.batch().draws.integers(
        "time", GRID - 1
    )  # the last one is pure noise there, and noised data here
    given = ours.batch({"time": number})
    source, pipe = given.pairs, ours.job.teacher.pipe
    assert source is not None
    text, nothing = source.cond["encoder_hidden_states"], ours.null()["encoder_hidden_states"]
    student, teacher, target = (ours.net(role) for role in ("student", "teacher", "target"))
    student.requires_grad_(True)
    target.requires_grad_(False)
    table = pipe.scheduler.alphas_cumprod

    def wide(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    def ends(eps: Tensor, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - wide((1 - table[n]).sqrt()) * eps) / wide(table[n].sqrt()), eps

    def consistent(net: nn.Module, x: Tensor, n: Tensor, told: Tensor) -> Tensor:
        eps = net(x, n, encoder_hidden_states=text, timestep_cond=told, return_dict=False)[0]
        scaled = 10.0 * n
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return wide(skip) * x + wide(out) * ends(eps, n, x)[0]

    def loss(eps: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        n = (index + 1) * 1000 // GRID - 1
        m = (n - 1000 // GRID).clamp_min(0)
        x = pipe.scheduler.add_noise(source.x0, eps, n)
        told = StableDiffusionPipeline.get_guidance_scale_embedding(pipe, scale - 1, 256)
        mine = consistent(student, x, n, told)
        with torch.no_grad():
            strong, weak = (
                ends(teacher(x, n, encoder_hidden_states=cond, return_dict=False)[0], n, x)
                for cond in (text, nothing)
            )
            x0, noise = (b + wide(scale) * (a - b) for a, b in zip(strong, weak, strict=True))
            earlier = wide(table[m].sqrt()) * x0 + wide((1 - table[m]).sqrt()) * noise
            wanted = consistent(target, earlier, m, told)
        return ((mine - wanted).square() + HUBER**2).sqrt().sub(HUBER).mean()

    def own(step: int) -> Tensor:
        index = torch.randint(GRID, (batch,))
        return loss(torch.randn_like(source.x0), index, LEAST + (MOST - LEAST) * torch.rand(batch))

    @torch.no_grad()
    def follow() -> None:
        for average, weight in zip(target.parameters(), student.parameters(), strict=True):
            average.mul_(DECAY).add_(weight, alpha=1 - DECAY)

    draws = given.draws
    eps, scale = draws.normal("eps", tuple(source.x0.shape[1:])), draws.uniform("guidance", LEAST, MOST)
    update = Update(
        lambda: loss(eps, number, scale), own, list(student.parameters()), [student, teacher, target], follow
    )
    yield Pair("LCM, embedded guidance", ours.update("student", given), update, batch)
