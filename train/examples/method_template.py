"""MyMethod: one sentence of what it does. Copied by `stepdistill cp own_method my_method.py`; works as it is.

Authors year, "Title", arXiv number, and which equations stand below. As it is: one call of the student lands where the
teacher's trajectory from the same noise ends (Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative
Models", 2101.02388).

    stepdistill train --method ./my_method.py --teacher emoji --set options.pairs=512
    python -c 'import stepdistill.testing as t; t.check_method("my_method.py")'
"""

from __future__ import annotations

from typing import cast

import torch

# All that a method may import of stepdistill, under one name: the page `stepdistill/extend.py` lists it.
from stepdistill import extend as sd


class MyMethod(sd.Method):
    """See the module's text."""

    # Where the student is called: 1 is noise, 0 data. The recipe's student.times or student.steps say otherwise.
    default_times = (1.0,)

    # The schema of `options:` in a recipe. PairOptions brings cached noises and samples of the teacher with it;
    # MethodOptions is for methods that need none.
    class Options(sd.PairOptions):
        huber: float = 0.0  # width of the pseudo-Huber distance; 0 is the square

    options: Options

    # def setup(self) -> None:
    #     """What the method has beside the student: networks, heads, buffers."""
    #     self.roles.add("target", "student", trained=False)   # an average of the student, starts as it
    #     self.roles.add("fake")                               # a network that is trained, starts as the teacher

    # def trained(self) -> dict[str, sd.Trained]:
    #     """What is trained, each with an optimiser of its own. Default: the student alone."""
    #     return {"student": sd.Trained("student"), "fake": sd.Trained("fake", follows=True)}

    # def turn(self, step: int) -> sd.Turn:
    #     """Whose update the method's step is."""
    #     return sd.Turn("student" if step % 5 == 0 else "fake", step)

    # def after_step(self, turn: sd.Turn) -> None:
    #     """After each update."""
    #     self.roles.average("target", "student", 0.95)

    def loss(self, turn: sd.Turn, batch: sd.Batch) -> sd.Loss:
        """The loss of the network whose turn it is: a scalar, the mean over samples, and what to log."""
        pairs = cast(sd.Examples, batch.pairs)
        noise = cast(torch.Tensor, pairs.noise)  # [B, ...]
        # Random numbers come from the batch by a name of their own, never from torch's generator.
        index = batch.draws.integers("step", len(self.times))  # [B]
        t = torch.tensor(self.times, device=noise.device)[index]  # [B]
        x_t = torch.where(sd.per_sample(t == 1, noise), noise, self.student.path.noised(pairs.x0, noise, t))
        error = (self.student.predict(x_t, t, pairs.cond).x0 - pairs.x0).square().flatten(1).mean(1)  # [B]
        if self.options.huber:
            error = (error + self.options.huber**2).sqrt() - self.options.huber
        return sd.Loss(error.mean(), {"error": error.mean()})

    def sampler(self) -> sd.Sampler:
        """How the student draws; becomes the exported scheduler. With renoise, fresh noise stands between its calls."""
        return sd.Sampler(self.times, renoise=len(self.times) > 1)
