"""The control of self_opd: images are noised and denoised, as any diffusion model is fine-tuned, whatever the steps.

    stepdistill train self_opd_emoji --teacher runs/lcm_emoji --set method=train/examples/plain_fine_tune.py ...

A few-step student's prediction at a time is where its next step should end, and no mean of clean images: this training
makes it one, and the few steps are lost.
"""

from __future__ import annotations

from typing import cast

from stepdistill import extend as sd


class PlainFineTune(sd.Method):
    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(sd.MethodOptions):
        renoise: bool = True  # as the student draws: fresh noise between steps

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"images"}

    options: Options

    def sampler(self) -> sd.Sampler:
        return sd.Sampler(self.times, self.options.renoise)

    def loss(self, turn: sd.Turn, batch: sd.Batch) -> sd.Loss:
        images, draws = cast(sd.Examples, batch.images), batch.draws
        t, eps = draws.uniform("t", 0.02, 1.0), draws.normal("eps", batch.shape)
        path = self.student.path
        said = self.student.raw(path.noised(images.x0, eps, t), t, images.cond)
        error = said - path.target(images.x0, eps, t, self.student.output)
        return sd.Loss(error.square().mean())
