"""SiD: a Fisher divergence between student and teacher, with gradients through what both networks see.

Zhou et al. 2024, "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for
One-Step Generation", 2404.04057; the few steps and the plain times of Zhou et al. 2024, "Long and Short Guidance in
Score identity Distillation for One-Step Text-to-Image Generation" (SiD-LSG), 2406.01561.

- Student turn: for x = G(noise), noised by a fresh (t, eps) to x_t, the loss is
  (x0_real - x0_fake) . ((x0_real - x) - alpha (x0_real - x0_fake)) / sg[mean|x - x0_real|].
  Its gradient flows through x, and through x_t into both networks, whose weights are frozen: without the latter it
  would be DMD's. With an exact fake score the first product alone is |x0_real - x0_fake|^2 in expectation, which is the
  divergence; the second, weighted by alpha, is the authors' correction of its gradient's bias. For alpha = 1 the loss
  is (x0_real - x0_fake) . (x0_fake - x).
- Fake turn: the ordinary diffusion loss on sg[x], before each update of the student.
- K steps: the student is trained where a rollout of its own exits.
- Optional, and not in the papers: regression on cached pairs as a warm start or beside the rest, and a GAN (SiDA's is
  another one).

Differs from the paper: times are uniform in ``score_times``, SiD-LSG's choice, instead of the EDM grid without its
noisiest fifth; the loss is a mean over elements instead of a hundred times the sum (Adam divides both out); the student
is called at t = 1 unless ``student.times`` says otherwise ([0.626] is timestep 625, SiD-LSG's; SiD's is sigma = 2.5).
Left out: guidance of the fake network (SiD-LSG's long and short guidance), the adversarial term of SiDA.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.losses.batch import Batch
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views


def numerator(views: Views, alpha: float) -> Tensor:
    """(x0_real - x0_fake) ((x0_real - x) - alpha (x0_real - x0_fake)), element by element, [B, C, H, W]."""
    gap = views.real.x0 - views.fake.x0
    return gap * ((views.real.x0 - views.x) - alpha * gap)


class SiD(ScoreMethod):
    """See the module's text."""

    through_inputs = True

    class Options(ScoreOptions):
        alpha: float = 1.2  # of the correction: 1.2, and 1.0 on AFHQ and for text to image (SiD, SiD-LSG)
        fake_updates: int = 1  # the two networks alternate, the fake one first

    options: Options

    def divergence(self, views: Views) -> Tensor:
        """The student's loss at these views, a scalar."""
        # The floor is the authors': at t near 0 the teacher returns x itself.
        return (numerator(views, self.options.alpha) / views.distance.detach().clamp_min(1e-5)).mean()

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(x, batch)
        return self.divergence(views), {"error": mean_size(views.error)}
