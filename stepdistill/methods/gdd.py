"""GDD: a GAN alone. A diffusion network is a one-step generator but for a few of its weights.

Zheng and Yang 2024, "Diffusion Models Are Innate One-Step Generators", 2405.20750.

- Student turn: sum over heads of softplus(-D(x)), x = G(noise): no teacher's sample, no score, no trajectory. A student
  that regresses on its teacher's samples is held to a minimum that is not its own; one that matches the distribution is
  not.
- Discriminator turn, as often: sum over heads of softplus(D(x)) + softplus(-D(real)), every ``penalty_every``-th time
  with R1 as many times as heavy.
- GDD-I: the weights inside of blocks stay as the teacher's (``student.freeze: [level-1]``), which loses nothing: layers
  of the one-step generator are there already.

Differs from the paper: its heads stand on VGG, EfficientNet and DeiT, which see pixels. Here they stand on the frozen
teacher's features at several depths, of latents noised to times uniform in ``noise_times`` (a start value of ours),
and R1 is taken in those features. Its EDM networks are given another preconditioner; here a network says what it said.
On a discrete table an eps network's x0 at the noisy end is 14.6 times its output, so that a start by regression on
pairs (``warm_start``), or an output of v, is in place (ours). For K steps the student exits a rollout of its own steps.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.losses.adversarial import AdversarialMethod, AdversarialOptions, NotNegative
from stepdistill.losses.gan import FeatureGan


class GDD(AdversarialMethod):
    """See the module's text."""

    class Options(AdversarialOptions):
        penalty_weight: NotNegative = 1e-4  # gamma of R1
        # Between which times real and generated latents are noised, before a flow teacher's time shift.
        noise_times: tuple[float, float] = (0.0, 0.6)

    options: Options

    def setup(self) -> None:
        low, high = self.options.noise_times
        if not 0 <= low < high <= 1:
            raise UserError(f"options.noise_times is {[low, high]}: give two times that rise within [0, 1]")
        super().setup()

    def discriminator(self) -> FeatureGan:
        return FeatureGan(self.teacher.denoiser, deep=True, times=self.noise_law)

    def noise_law(self, draws: Draws, stream: str) -> Tensor:
        """Uniform times [B] of ``noise_times``."""
        return draws.uniform(stream, *self.options.noise_times)
