"""A few-step student learns something new at the states that it meets itself, and keeps its few steps.

D-OPSD, 2026, 2605.05204. The teacher of the recipe is the few-step student that is fine-tuned, at its own times.

- Rollout: the student's own K steps under the plain caption, states without a graph. At each its clean prediction is
  drawn to that of a teacher who knows more: sum_k w_k mean (x0_student - sg x0_teacher)^2, w_k halving from call to
  call (8, 4, 2, 1 over 15). No noised image is met, which the student would meet in no drawing.
- ``source: captions``: the teacher is an average of the student, told the rich caption that ``data.rich`` has for the
  plain one (decay 0.999 for 200 updates, then 0.9999).
- ``source: images``: the paper's teacher reads a reference image, which few pipelines can. Ours (a guess in its place)
  is the exact denoiser of the reference images themselves, sum_i softmax(-|x_t - alpha y_i|^2 / 2 sigma^2) y_i over
  those with the sample's caption, and its target where ``reference_calls`` DDIM steps of it lead from the state: on its
  own trajectory, so that each noise has one image, and all get their share. It needs no network. The images are those
  in a part of a batch, all of them where these are at least as many as a few references.
- ``keep_weight`` (ours, with images): on the run's other prompts the student is held, at its own states, to the frozen
  network that it started as.

Differs from the paper: whole networks or one adapter, not two on an editing model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import FlowPath, Path, Prediction
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, MethodOptions, Turn
from stepdistill.losses.rollout import Visit, led_to, squared, visits
from stepdistill.networks.sampler import Sampler

Target = Callable[[Visit], Tensor]
Decay = Annotated[float, Field(ge=0, lt=1)]


def among(path: Path, x: Tensor, t: Tensor, clean: Tensor, allowed: Tensor) -> Prediction:
    """The exact denoiser of a set of samples.

    Args:
        path, x, t: states [B, ...] of the path at t [B], one time for all.
        clean: the samples [N, ...].
        allowed: which of them each state may come from, [B, N].
    """
    alpha, sigma = path.alpha_sigma(t)
    apart = torch.cdist(x.flatten(1), alpha[0] * clean.flatten(1)).square()
    near = (-apart / (2 * sigma.square()[:, None])).masked_fill(~allowed, -torch.inf).softmax(1)
    return path.read((near @ clean.flatten(1)).view_as(x), "x0", x, t)


def alike(cond: Condition, count: int, like: Tensor) -> Tensor:
    """Which samples have equal conditions, [B, B]."""
    same = torch.ones(count, count, dtype=torch.bool, device=like.device)
    for value in cond.tensors.values():
        rows = value.reshape(count, -1)
        same &= (rows[:, None] == rows[None]).all(2)
    return same


class SelfOPD(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)
    of_few_steps = True

    class Options(MethodOptions):
        group: ClassVar[str] = "on-policy"

        source: Literal["captions", "images"] = "captions"  # of what is new: data.rich, or data.images
        reference_calls: PositiveInt = 8  # steps of the images' denoiser for a target
        keep_weight: Annotated[float, Field(ge=0)] = 1.0  # of staying as it was on other prompts, with images
        early_decay: Decay = 0.999  # of the teacher that is an average, at first
        early_updates: int = 200  # so many updates
        target_decay: Decay = 0.9999  # then
        renoise: bool | None = None  # as the student draws: fresh noise between steps; default by the path

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"images" if self.source == "images" else "rich"}

    options: Options

    def setup(self) -> None:
        if self.options.source == "captions":
            self.average = self.roles.add("target", "student", trained=False)

    @property
    def leaves_teacher(self) -> bool:
        return True

    def sampler(self) -> Sampler:
        renoise = self.options.renoise
        return Sampler(
            self.times, not isinstance(self.student.path, FlowPath) if renoise is None else renoise
        )

    @torch.no_grad()
    def from_captions(self, visit: Visit, batch: Batch) -> Tensor:
        """The clean prediction [B, ...] of the average that is told more."""
        return self.average.predict(visit.x, visit.t, cast(Condition, batch.rich)).x0

    @torch.no_grad()
    def from_start(self, visit: Visit, cond: Condition) -> Tensor:
        """The clean prediction [B, ...] of what the student started as: an embedded scale is the recipe's."""
        return self.teacher.denoiser.predict(visit.x, visit.t, cond).x0

    @torch.no_grad()
    def from_images(self, visit: Visit, images: Examples, allowed: Tensor) -> Tensor:
        """What the student is to say at a state to stay on the trajectory of the images' own denoiser, [B, ...]."""
        path = self.student.path
        if self.sampler().renoise:  # what it says is where the trajectory ends
            visit = visit.to_the_end()

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            return among(path, x, t, images.x0, allowed)

        return led_to(denoise, visit, self.options.reference_calls).x0

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if self.options.source == "captions":
            return Loss(self.apart(batch, batch.cond, lambda visit: self.from_captions(visit, batch)))
        images = cast(Examples, batch.images)
        allowed = alike(images.cond, len(images.x0), images.x0)
        new = self.apart(batch, images.cond, lambda visit: self.from_images(visit, images, allowed))
        if not self.options.keep_weight:
            return Loss(new)
        kept = self.apart(batch, batch.cond, lambda visit: self.from_start(visit, batch.cond))
        return Loss(new + self.options.keep_weight * kept, {"new": new, "kept": kept})

    def apart(self, batch: Batch, cond: Condition, target: Target) -> Tensor:
        """The weighted error of the student's clean predictions at its own states, a scalar."""
        found = visits(self.student, self.sampler(), batch, cond)
        total, whole = batch.noise.new_zeros(()), 2.0 ** len(found) - 1
        for call, visit in enumerate(found):
            error = self.student.predict(visit.x, visit.t, cond).x0 - target(visit)
            total = total + 2.0 ** (len(found) - 1 - call) / whole * squared(error).mean()
        return total

    def after_step(self, turn: Turn) -> None:
        if self.options.source == "captions":
            options = self.options
            decay = options.early_decay if turn.step < options.early_updates else options.target_decay
            self.roles.average("target", "student", decay)
