"""One small look at a run: what the student draws for a few prompts, and what its teacher and its followers say of it.

Nothing is decoded. The prompts and noises are the same at every look, so that one look can be set beside another, and
beside the teacher's own samples of them. Random numbers come from streams of their own, and nothing of the run is
changed: with looks and without, it is the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.data.batches import Data
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.guidance import in_interval
from stepdistill.diffusion.path import Prediction
from stepdistill.diffusion.solvers import solve
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.objective import Objective
from stepdistill.metrics.motion import changes
from stepdistill.metrics.spectrum import high_frequency_share
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.sampler import Sampler, schedule_times

LEVELS = {"low": 0.25, "middle": 0.5, "high": 0.75}
"""Noise levels at which predictions are compared, as times before a flow teacher's shift."""
STEPS = 8
"""Of the teacher's own samples."""
EXTREME = 0.99
"""Share of the teacher's values that lie nearer to its mean than an extreme one."""


def grid_of(batch: int, prompts: int) -> tuple[int, int]:
    """Prompts and noises of a look, every prompt with every noise: 9 samples, or fewer where batches are small."""
    wanted, noises = (3, 3) if batch >= 24 else (3, 2) if batch >= 12 else (2, 2)
    return min(wanted, prompts), noises


class Probe:
    """Looks at a run.

    Args:
        objective: what is trained.
        data: where conditions come from.
        seed: of the run.
        batch: samples of an update, in all.
        at_once: most samples in a call.
    """

    def __init__(self, objective: Objective, data: Data, seed: int, batch: int, at_once: int) -> None:
        self.objective, self.method, self.at_once = objective, objective.method, max(1, at_once)
        device = data.teacher.device
        prompts, noises = self.grid = grid_of(batch, data.count)
        index = torch.tensor([i * data.count // prompts for i in range(prompts)])
        self.count = prompts * noises
        self.cond = data.condition(index.repeat_interleave(noises))
        self.codec = data.teacher.codec
        self.shape = self.codec.shape
        self._draws = Draws(seed, 0, 0, noises, device)
        self.noise = self._draws.normal("health noise", self.shape).repeat(prompts, *[1] * len(self.shape))
        levels = [self.method.teacher.path.shifted(level) for level in LEVELS.values()]
        two = 2 if self.count >= 2 * len(levels) else 1
        # Spread over prompts, and as many samples at each level.
        few = min(two * len(levels), self.count)
        self.few = torch.arange(few, device=device) * self.count // few
        self.t = torch.tensor(levels, device=device).repeat(two)[:few]
        self.eps = Draws(seed, 0, 0, few, device).normal("health level", self.shape)
        spans = [one.span for one in objective.trained.values() if not one.follows]
        roles = {k: one for k, one in objective.trained.items() if one.follows and one.role is not None}
        followers = {k: one for k, one in roles.items() if not one.of_data}
        # A follower of samples that are drawn by several networks may follow what only some of them drew.
        self.followers: dict[str, str] = (
            {} if any(spans) else {k: str(one.role) for k, one in followers.items()}
        )
        self.reference = torch.empty(0, device=device)
        self.before, self.towards = torch.empty(0, device=device), torch.empty(0, device=device)
        self.known = torch.empty(0, device=device)

    def _in_parts(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        return torch.cat(
            [work(slice(i, min(i + self.at_once, count))) for i in range(0, count, self.at_once)]
        )

    def _fresh(self, call: int) -> Tensor:
        noise = self._draws.normal(f"health renoise {call}", self.shape)
        return noise.repeat(self.grid[0], *[1] * len(self.shape))

    @torch.no_grad()
    def draw(self, sampler: Sampler) -> Tensor:
        """The student's samples [B, ...] of all prompts and noises."""
        student = self.method.student

        def some(own: slice) -> Tensor:
            fresh = lambda call: self._fresh(call)[own]  # noqa: E731
            return sampler.draw(student, self.noise[own], self.cond.rows(own), fresh)

        return self._in_parts(some, self.count)

    @torch.no_grad()
    def taught(self) -> Tensor:
        """The teacher's samples [B, ...] of the same."""
        teacher, scale = self.method.teacher, self.method.options.guidance
        times = (*schedule_times(teacher.path, STEPS), 0.0)

        def some(own: slice) -> Tensor:
            cond = self.cond.rows(own)
            start = self.noise[own]
            return solve(lambda x, t: teacher.predict(x, t, cond, guidance=scale), start, times, "ddim")

        return self._in_parts(some, self.count)

    @torch.no_grad()
    def look(self, batch: Batch, sampler: Sampler) -> dict[str, float]:
        """Numbers by name; those that do not apply are left out.

        Args:
            batch: of the update before, whose examples are looked at, too.
            sampler: how the student can be sampled by now.
        """
        if not len(self.reference):
            self.reference = self.taught()
        x, reference = self.draw(sampler), self.reference
        numbers = {**self._of_samples(x), **self._of_data(batch)}
        few, t = x[self.few], self.t
        cond = self.cond.rows(self.few)
        teacher = self.method.teacher
        noised = teacher.path.noised(few, self.eps, t)
        # The teacher's own samples, one at each level: what a frozen network says of them stays.
        own = teacher.path.noised(reference[self.few], self.eps, t)[: len(LEVELS)]
        count = len(few)
        said = self._predict(
            lambda x_t, at, c: teacher.predict(x_t, at, c),
            torch.cat([noised, own]) if self.followers else own,
            torch.cat([t, t[: len(own)]]) if self.followers else t[: len(own)],
            cond.join(cond.rows(slice(0, len(own)))) if self.followers else cond.rows(slice(0, len(own))),
        )
        answer = said[-len(own) :]
        numbers |= self._of_errors(
            "teacher", answer, reference[self.few][: len(own)], t[: len(own)], reference
        )
        if not len(self.known):
            self.known = answer.clone()
        numbers["teacher_change"] = float(
            (answer - self.known).square().mean().sqrt() / self.known.square().mean().sqrt().clamp_min(1e-8)
        )
        if not self.followers:
            return numbers
        real = said[:count]
        scale = self.method.options.score_scale
        one = min(count, len(LEVELS))  # at each level: guided calls are dear
        guided = real[:one]
        if scale != 1.0:
            at = in_interval(scale, t, *self.method.options.score_interval)

            def guide(own: slice) -> Tensor:
                return teacher.predict(noised[own], t[own], cond.rows(own), guidance=at[own]).x0

            guided = self._in_parts(guide, one)
            for level, rows in self._levels(one).items():
                # Samples that are off already make either deviate more.
                usual = max(deviation(reference), deviation(real[rows]))
                numbers[f"guided_{level}"] = deviation(guided[rows]) / max(usual, 1e-8)
        found: list[dict[str, float]] = []
        for name, role in self.followers.items():
            fake = self._predict(self._denoiser(role), noised, t, cond)
            found.append(self._of_follower(name, fake, real, guided, few, x))
            direction = guided - fake[:one]
        numbers |= {key: max(each[key] for each in found) for key in found[0]}
        if len(self.before):
            moved = few[:one] - self.before
            if float(moved.abs().max()) > 0:
                inner = (moved * self.towards).flatten(1).sum(1)
                sizes = moved.flatten(1).norm(dim=1) * self.towards.flatten(1).norm(dim=1)
                numbers["towards"] = float((inner / sizes.clamp_min(1e-12)).mean())
        self.before, self.towards = few[:one].clone(), direction
        return numbers

    def _denoiser(self, role: str) -> Callable[[Tensor, Tensor, Condition], Prediction]:
        network: Denoiser = self.method.roles[role]
        return lambda x_t, t, cond: network.predict(x_t, t, cond)

    def _predict(
        self, say: Callable[[Tensor, Tensor, Condition], Prediction], x_t: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        """x0 [B, ...] as a network says it."""
        return self._in_parts(lambda own: say(x_t[own], t[own], cond.rows(own)).x0, len(x_t))

    def _levels(self, count: int) -> dict[str, slice]:
        """The rows of each level among the few."""
        return {name: slice(i, count, len(LEVELS)) for i, name in enumerate(LEVELS) if i < count}

    def _of_follower(
        self, name: str, fake: Tensor, real: Tensor, guided: Tensor, x: Tensor, all_of_it: Tensor
    ) -> dict[str, float]:
        found = self._of_errors("follower", fake, x, self.t, all_of_it)
        ratios, one = list[float](), len(guided)
        for level, rows in self._levels(len(x)).items():
            own, other = ((each[rows] - x[rows]).square().mean() for each in (fake, real))
            found[f"lag_{level}"] = float(own / other.clamp_min(1e-12))
            ratios.append(max(found[f"lag_{level}"], 1e-8))
            error, distance = ((some[:one][rows] - guided[rows]).abs().mean() for some in (fake, x))
            found[f"field_{level}"] = float(error / distance.clamp_min(1e-12))
        found["lag"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return found

    def _of_errors(self, name: str, said: Tensor, x: Tensor, t: Tensor, like: Tensor) -> dict[str, float]:
        """The squared error at each level over that of the best guess of all that know mean and variance alone."""
        variance = deviation(like) ** 2
        alpha, sigma = self.method.teacher.path.alpha_sigma(t)
        guess = variance * sigma.square() / (alpha.square() * variance + sigma.square())
        errors = (said - x).square().flatten(1).mean(1) / guess.clamp_min(1e-12)
        return {
            f"{name}_error_{level}": float(errors[rows].mean())
            for level, rows in self._levels(len(x)).items()
        }

    def _of_samples(self, x: Tensor) -> dict[str, float]:
        """Of the student's samples, beside the teacher's."""
        reference, (prompts, noises) = self.reference, self.grid
        found: dict[str, float] = {}
        mine, theirs = (each.view(prompts, noises, -1) for each in (x, reference))
        if prompts > 1:
            found["diversity_of_prompts"] = spread(mine) / max(spread(theirs), 1e-8)
        if noises > 1:
            found["diversity_of_noises"] = spread(mine.transpose(0, 1)) / max(
                spread(theirs.transpose(0, 1)), 1e-8
            )
        moving, taught = (self.codec.by_frame(each) for each in (x, reference))
        if moving is not None and taught is not None:
            if taught.shape[1] > 1:
                found["motion"] = float(changes(moving).mean() / changes(taught).mean().clamp_min(1e-8))
            x, reference = moving.flatten(0, 1), taught.flatten(0, 1)
        mean, size = channel_means(reference), deviation(reference)
        found["latent_mean"] = float((channel_means(x) - mean).square().mean().sqrt()) / max(size, 1e-8)
        found["latent_deviation"] = deviation(x) / max(size, 1e-8)
        far = (reference - mean).abs().flatten()
        limit = far.sort().values[min(len(far) - 1, int(EXTREME * len(far)))]
        found["extremes"] = float(((x - mean).abs() > limit).float().mean())
        if min(x.shape[-2:]) >= 4:
            theirs_high = float(high_frequency_share(reference).mean())
            found["high_frequencies"] = float(high_frequency_share(x).mean()) / max(theirs_high, 1e-8)
        return found

    def _of_data(self, batch: Batch) -> dict[str, float]:
        """How much the examples of a batch differ, beside the teacher's samples of different prompts."""
        prompts, noises = self.grid
        theirs = spread(self.reference.view(1, prompts * noises, -1).transpose(0, 1))
        found: dict[str, float] = {}
        for name, examples in (("images", batch.images), ("pairs", batch.pairs)):
            if examples is not None and len(examples.x0) > 1:
                rows = examples.x0[: 2 * self.count].flatten(1)[:, None]
                found[f"spread_{name}"] = spread(rows) / max(theirs, 1e-8)
        return found


def spread(samples: Tensor) -> float:
    """The root mean square difference of two samples [A, B, D] that differ in A and share B."""
    return float((2 * samples.float().var(0).mean()).sqrt())


def channel_means(x: Tensor) -> Tensor:
    """[1, C, 1, ...] of [B, C, ...]."""
    return x.mean(dim=(0, *range(2, x.ndim)), keepdim=True)


def deviation(x: Tensor) -> float:
    """Root mean square distance of the values of x [B, C, ...] from their channel's mean."""
    return float((x - channel_means(x)).square().mean().sqrt())
