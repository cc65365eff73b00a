"""Model-Optimizer's DMDPipeline at the embedded flow teacher, a small Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from modelopt.torch.fastgen.config import DMDConfig, SampleTimestepConfig
from modelopt.torch.fastgen.methods.dmd import DMDPipeline
from peer import Called, Ours, Pair, Update, handed_out
from torch import Tensor


def pairs(batch: int) -> Iterator[Pair]:
    for guidance in (3.0, 1.0):
        yield from dmd(batch, guidance)


def dmd(batch: int, guidance: float) -> Iterator[Pair]:
    """One step, no GAN, the fake network's error in x0."""
    ours = Ours("dmd", "emoji-flow", batch, {"guidance": guidance})
    like, given = ours.job.teacher.denoiser, ours.batch()
    config: Any = DMDConfig(
        pred_type="flow",
        guidance_scale=guidance if guidance != 1 else None,
        num_train_timesteps=1000,
        fake_score_pred_type="x0",
        sample_t_cfg=SampleTimestepConfig(time_dist_type="uniform", max_t=1.0),
    )
    nets = [Called(ours.net(role), like) for role in ("student", "teacher", "fake")]
    student, _, fake = nets
    theirs = DMDPipeline(*nets, config)
    null = ours.null() if guidance != 1 else None
    shape = tuple(given.noise.shape[1:])

    def student_loss(noise: Tensor, cond: Any) -> Tensor:
        student.requires_grad_(True)
        fake.requires_grad_(False)
        told = {} if null is None else {"negative_encoder_hidden_states": null}
        return theirs.compute_student_loss(noise, noise, cond, **told)["total"]

    def fake_loss(noise: Tensor, cond: Any) -> Tensor:
        student.requires_grad_(False)
        fake.requires_grad_(True)
        return theirs.compute_fake_score_loss(noise, noise, cond)["total"]

    draws, path = given.draws, like.path
    times = {
        "student": path.shifted(draws.uniform("score t", *ours.method.options.score_times)),
        "fake": path.shifted(draws.uniform("fake t")),
    }
    noises = {"student": draws.normal("score eps", shape), "fake": draws.normal("fake eps", shape)}
    losses = {"student": student_loss, "fake": fake_loss}
    for name, net in (("student", student), ("fake", fake)):

        def on_given(name: str = name) -> Tensor:
            at = patch.object(theirs, "sample_timesteps", lambda *_, **__: times[name])
            with at, handed_out(noises[name]):
                return losses[name](given.noise, given.cond)

        def on_own(step: int, name: str = name) -> Tensor:
            return losses[name](torch.randn_like(given.noise), given.cond)

        update = Update(on_given, on_own, list(net.parameters()), nets)
        scale = f"CFG {guidance:g}" if guidance != 1 else "no CFG"
        yield Pair(f"DMD {name}, {scale}", ours.update(name, given), update, batch)
