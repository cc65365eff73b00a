"""Trajectory segmented consistency: trajectory consistency within segments, which are merged from stage to stage.

Ren et al. 2024, "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis", 2404.13686.

- Stages of k = 8, 4, 2, 1 equal segments of time, one after another in one run: a stage goes on from the weights of the
  one before, and the student of the last, full weights or one LoRA, is drawn in 1, 2, 4 or 8 steps.
- Loss (algorithm 1): d(f(z_n, n, e), f_target(z_m, m, e)), z_m a guided DDIM step of the frozen teacher from z_n, and e
  uniform on the grid's times from the lower edge of n's segment up to m; f(x_t, t, e) = alpha_e x0 + sigma_e eps, as in
  TCD, which the last stage is. An edge of two segments belongs to the lower one, as nothing of the upper lies below it.
- Adversarial term, in the late stages: the student's jump and its target, noised from e to one time of the segment, are
  told apart by a head on the teacher's features; the student's part is -log D.
- Score term: DMD's gradient (2311.18828) on the student's one-step samples, with a fake score network.
- Sampled with gamma = 1, as the unified LoRA: each jump goes to clean data and fresh noise leads back.

Left out: human feedback (reward models, segmentation loss) and timestep 800 as a start; no weights were published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.path import TablePath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SourceOptions, Target, examples, jump, last_time, noised
from stepdistill.losses.contract import Loss, Method, Trained, Turn
from stepdistill.losses.distances import elementwise_huber, mean_size, rms
from stepdistill.losses.fake_score import (
    FakeScoreOptions,
    denoising_loss,
    loss_with_gradient,
    rollout,
    turn_at,
    views_of,
)
from stepdistill.losses.gan import FeatureGan, discriminator_loss, generator_loss
from stepdistill.networks.sampler import Sampler

ONE_STEP = Sampler((1.0,), renoise=False)


class TSCD(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(SourceOptions, FakeScoreOptions):
        guidance: float = 7.5  # of the teacher's step, and of the cached samples
        segments: tuple[int, ...] = (8, 4, 2, 1)  # of each stage
        stage_updates: int = 2000  # updates of each stage; the last one goes on
        grid: int = 40  # times on the path, a multiple of each number of segments
        skip: int = 1  # grid times a teacher step skips, within the segment
        noise_share: float = 0.0  # share of samples put at pure noise, where every drawing starts
        target_decay: float = 0.95  # decay of the target network; 0: the student itself
        huber: float | None = None  # c of the pseudo-Huber loss per element; null: squared
        adversarial_weight: float = 0.0  # of the adversarial term; 0 leaves it out
        score_weight: float = 0.0  # of the score term; 0 leaves it out
        critic_segments: int = 2  # both terms act in stages of at most so many segments
        gamma: float = 1.0  # fresh noise between steps on a table, a pipeline's `eta`; renoise=false: 0

    options: Options

    def setup(self) -> None:
        options = self.options
        each = options.segments
        if not each or any(k < 1 or options.grid % k for k in each) or list(each) != sorted(each)[::-1]:
            raise UserError(
                f"options.segments is {list(each)}: they must descend, and each divide options.grid={options.grid}"
            )
        self.early = sum(k > options.critic_segments for k in each) * options.stage_updates
        self.target = Target(self.roles, options.target_decay)
        self.gan = FeatureGan(self.teacher.denoiser) if options.adversarial_weight else None
        self.fake = self.roles.add("fake", rank=self.options.fake_lora_rank) if options.score_weight else None

    def trained(self) -> dict[str, Trained]:
        critics = Trained("fake" if self.fake else None, self.gan, follows=True)
        return {**super().trained(), **({"fake": critics} if self.fake or self.gan else {})}

    def segments(self, step: int) -> int:
        """k of the stage that the update belongs to."""
        return self.options.segments[: step // self.options.stage_updates + 1][-1]

    def turn(self, step: int) -> Turn:
        alone = self.gan is None and self.fake is None
        return Turn("student" if alone else turn_at(step, self.options, self.early), step)

    def lr_ratio(self, turn: Turn) -> float:
        return self.options.fake_lr_ratio if turn.network == "fake" else 1.0

    def sampler(self) -> Sampler:
        table = isinstance(self.student.path, TablePath)
        gamma = 0.0 if self.options.renoise is False else self.options.gamma
        return Sampler(self.times, table, self.options.grid, gamma=gamma if table else None)

    def two_jumps(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """The student's jump and its target [B, C, H, W], their end and their segment's start [B], the conditions."""
        options, draws = self.options, batch.draws
        source, path = examples(batch, options.source), self.student.path
        each = options.grid // self.segments(step)
        n = draws.integers("time", options.grid) + 1
        n = torch.where(draws.uniform("start") < options.noise_share, torch.full_like(n, options.grid), n)
        low = (n - 1) // each * each  # an edge ends the segment below it
        m = torch.maximum(n - options.skip, low)
        e = torch.minimum(low + (draws.uniform("end") * (m - low + 1)).floor(), m)
        t, s, e, start = (path.shifted(k / options.grid) for k in (n, m, e, low + each))
        s, e = s.clamp_min(last_time(path)), e.clamp_min(last_time(path))
        z = noised(path, source.x0, draws.normal("eps", tuple(source.x0.shape[1:])), t)
        with torch.no_grad():
            z_s = self.teacher.predict(z, t, source.cond, guidance=options.guidance).at(s)
            target = jump(self.target.denoiser, z_s, s, e, source.cond)
        return jump(self.student, z, t, e, source.cond), target, e, start, source.cond

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if turn.network == "fake":
            return self.critics_loss(batch, turn.step)
        options = self.options
        jumped, target, e, start, cond = self.two_jumps(batch, turn.step)
        r = jumped - target
        loss = r.square().mean() if options.huber is None else elementwise_huber(r, options.huber)
        logs = {"residual": rms(r)}
        if turn.step < self.early:
            return Loss(loss, logs)
        if self.gan is not None:
            logs["gan"] = generator_loss(self.gan.logits_above(jumped, e, start, cond, batch))
            loss = loss + options.adversarial_weight * logs["gan"]
        if self.fake is not None:
            x = rollout(self.student, ONE_STEP, batch)
            views = views_of(self.fake, self.teacher, x, batch, options, options.score_scale)
            logs["field"] = mean_size(views.field)
            loss = loss + options.score_weight * loss_with_gradient(x, views.field)
        return Loss(loss, logs)

    def critics_loss(self, batch: Batch, step: int) -> Loss:
        """The discriminator's loss and the fake network's, of those there are."""
        logs = {}
        with torch.no_grad():
            jumped, target, e, start, cond = self.two_jumps(batch, step)
            x = rollout(self.student, ONE_STEP, batch)
        if self.gan is not None:
            real, made = (self.gan.logits_above(each, e, start, cond, batch) for each in (target, jumped))
            logs["discriminator"] = discriminator_loss(real, made)
        if self.fake is not None:
            logs["denoising"] = denoising_loss(self.fake, x, batch, self.options.fake_loss)
        return Loss(torch.stack(list(logs.values())).sum(), logs)

    def after_step(self, turn: Turn) -> None:
        self.target.update()
