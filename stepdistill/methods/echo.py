"""EchoDistill: a few-step student learns a new word from a few images, beside a many-step teacher that learns it too.

"EchoDistill: Bidirectional Concept Distillation for One-Step Diffusion Personalization", 2025, 2510.20512. Its losses
are known in kind, from summaries; their weights, c(t), the share of echoed samples and their filter are guesses, ours.

- Both networks share the word (``data.placeholder_token``), and train keys and values of attention to prompts
  (``student.freeze: [all-but-prompts]``). The student starts as one of few steps, ``student.start``.
- Teacher's turn, of the role "learner": the diffusion loss of the images, told the word, and of the teacher's own
  samples of other prompts (``prior_weight``), so that it forgets none.
- Student's turn: x = its sample, told the word; x_T = sg the learner's clean prediction at x noised to t. Alignment:
  (1 - t) (identity_weight (1 - cos of an image network's features) + squared_weight |x - x_T|^2 + wasserstein_weight
  the sliced Wasserstein distance of patches at three scales). Adversary: heads on image networks (``features``) tell
  its pictures from the images. Ours: on other prompts it is held to what it started as (``keep_weight``).
- The word's turn: both losses at once, both networks frozen: its gradient is the sum of the two branches'.
- Echo: from ``echo_after`` on a share of the images in the teacher's turn is the student's samples, where these look
  enough like the image in whose place they stand (``echo_floor``, a cosine). Do not score with ``features``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, PairOptions, Trained, Turn
from stepdistill.losses.fake_score import denoising_loss
from stepdistill.losses.likeness import apart, mixed_in
from stepdistill.losses.looks import Looks
from stepdistill.losses.picture_gan import PictureGan
from stepdistill.networks.concept import Concept
from stepdistill.networks.sampler import Sampler

Weight = Annotated[float, Field(ge=0)]
CYCLE = ("discriminator", "learner", "word", "student")


class Echo(Method):
    """See the module's text."""

    class Options(PairOptions):
        group: ClassVar[str] = "on-policy"

        pairs: int = 512  # the teacher's samples of other prompts
        features: tuple[str, ...] = ("emoji",)  # image networks: of identity the first, of the adversary all
        identity_weight: Weight = 1.0  # of the cosine in the first of the features
        squared_weight: Weight = 0.1  # of latents
        wasserstein_weight: Weight = 0.1  # of patches
        adversarial_weight: Weight = 0.05  # of passing for images
        keep_weight: Weight = 1.0  # of staying as it was on other prompts
        prior_weight: Weight = 1.0  # of the learner's, on the teacher's samples
        echo_share: Annotated[float, Field(ge=0, le=1)] = 0.25  # of images that are the student's
        echo_after: Annotated[int, Field(ge=0)] = 800  # updates without
        echo_floor: Annotated[float, Field(ge=-1, le=1)] = 0.5  # least cosine to what it replaces
        learner_lr_ratio: PositiveFloat = 1.0  # learning rate of the teacher over train.lr
        word_lr_ratio: PositiveFloat = 1.0  # of the word
        discriminator_lr_ratio: PositiveFloat = 1.0  # of the heads
        renoise: bool | None = None  # fresh noise between steps, or the predicted; default by the path

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"images", "concept", "looks"}

        @property
        def networks(self) -> dict[str, str]:
            return dict.fromkeys(self.features, "options.features")

    options: Options

    def setup(self) -> None:
        self.concept = cast(Concept, self.roles.concept)
        self.learner = self.roles.add("learner", frozen_alike=True)
        self.kept = self.roles.add("start", "student", trained=False)
        self.gan = PictureGan(cast(Looks, self.looks))

    def sampler(self) -> Sampler:
        usual = not isinstance(self.student.path, FlowPath)
        return Sampler(self.times, usual if self.options.renoise is None else self.options.renoise)

    def trained(self) -> dict[str, Trained]:
        return {
            "student": Trained("student"),
            "learner": Trained("learner", follows=True, of_data=True),
            "word": Trained(extra=self.concept, follows=True),
            "discriminator": Trained(extra=self.gan, follows=True),
        }

    def turn(self, step: int) -> Turn:
        return Turn(CYCLE[step % len(CYCLE)], step)

    def phase(self, step: int) -> str:
        return "echo" if self.options.echo_share and step >= self.options.echo_after else "teacher to student"

    def lr_ratio(self, turn: Turn) -> float:
        return cast(float, getattr(self.options, f"{turn.network}_lr_ratio", 1.0))

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        images = cast(Examples, batch.images)
        cond = self.concept.encode(cast(Tensor, images.number))
        if turn.network == "discriminator":
            with torch.no_grad():
                made = self.drawn(batch, cond)
            return Loss(self.gan.for_discriminator(made, images.x0))
        if turn.network == "learner":
            return self.taught(turn, batch, cond)
        found = self.aligned(batch, cond)
        if turn.network == "word":
            return Loss(self.taught(turn, batch, cond).value + found.value)
        kept = self.away(batch)
        return Loss(found.value + self.options.keep_weight * kept, {**found.logs, "kept": kept})

    def drawn(self, batch: Batch, cond: Condition) -> Tensor:
        """The student's clean samples [B, ...] under conditions; the last call alone has a graph."""
        return self.sampler().draw(self.student, batch.noise, cond, batch.fresh)

    def taught(self, turn: Turn, batch: Batch, cond: Condition) -> Loss:
        """The learner's diffusion loss: of the images, some of them echoed, and of the teacher's samples."""
        x0, options, logs = cast(Examples, batch.images).x0, self.options, dict[str, Tensor]()
        if self.phase(turn.step) == "echo":
            with torch.no_grad():
                made, looks = self.drawn(batch, cond), cast(Looks, self.looks)
                which = batch.draws.uniform("echo") < options.echo_share
                x0, logs["echoed"] = mixed_in(looks, x0, made, which, options.echo_floor)
        loss = denoising_loss(self.learner, x0, replace(batch, cond=cond), "output")
        prior = cast(Examples, batch.pairs)
        kept = denoising_loss(self.learner, prior.x0, replace(batch, cond=prior.cond), "output")
        return Loss(loss + options.prior_weight * kept, {"concept": loss, "prior": kept, **logs})

    def aligned(self, batch: Batch, cond: Condition) -> Loss:
        """How far the student's samples are from what the learner makes of them, and from passing for images."""
        path, options, looks = self.student.path, self.options, cast(Looks, self.looks)
        x, t = self.drawn(batch, cond), path.shifted(batch.draws.uniform("align t"))
        with torch.no_grad():
            x_t = path.noised(x, batch.draws.normal("align eps", batch.shape), t)
            target = self.learner.predict(x_t, t, cond).x0
        logs = {k: ((1 - t) * v).mean() for k, v in apart(looks, x, target, batch.draws).items()}
        aligned = sum(getattr(options, f"{name}_weight") * value for name, value in logs.items())
        logs["adversarial"] = self.gan.for_generator(x)
        return Loss(aligned + options.adversarial_weight * logs["adversarial"], logs)

    def away(self, batch: Batch) -> Tensor:
        """How far its samples of other prompts are from those of what it started as, a scalar."""
        with torch.no_grad():
            before = self.sampler().draw(self.kept, batch.noise, batch.cond, batch.fresh)
        return (self.sample(batch) - before).square().mean()
