"""A proxy of the reward that sees latents: the student climbs it, and cannot search a large judge for weak places.

Li et al. 2024, "Reward Guided Latent Consistency Distillation" (RG-LCD), 2403.11027, section 4.2.

- R_lat(z, prompt): a small network of latents; the cosine of what it gives with the prompt's text features.
- Its turns, "term reward": z is the student's prediction, the method's target and the clean latent of one prompt. Over
  each two of them, KL(softmax(R(decode(z)) / tau) || softmax(R_lat(z))): it learns the reward's differences.
- The student's turns: the gradient of R_lat alone, whose weights stand still.

The paper's proxy is a CLIP that starts from a trained one; here a small convolutional network starts from nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.losses.contract import Trained
from stepdistill.losses.reward_term import RewardOptions, RewardTerm
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import Shown

WIDTH = 64


class LatentReward(nn.Module):
    """The cosine [B] of latents with text features.

    Args:
        shape: (C, H, W) of the latents.
        dimension: D of the texts.

    Raises:
        UserError: latents that are no pictures.
    """

    def __init__(self, shape: tuple[int, ...], dimension: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UserError(
                f"terms.reward_proxy reads latents [C, H, W], and this teacher's are {list(shape)}: set it to false"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator_for("latent reward").initial_seed())
            layers: list[nn.Module] = [nn.Conv2d(shape[0], WIDTH, 3, padding=1)]
            side = min(shape[1:])
            while side > 4:
                layers += [nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)]
                side = (side + 1) // 2
            layers += [nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU()]
            self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, dimension)

    def forward(self, latents: Tensor, texts: Tensor) -> Tensor:
        seen: Tensor = self.head(self.body(latents).mean(dim=(2, 3)))  # [B, D]
        return (F.normalize(seen, dim=1) * texts).sum(1)


def pairwise_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) over each two of K rows [K, B], summed over the pairs: [B]."""
    parts = []
    for one, other in combinations(range(len(wanted)), 2):
        logits, known = found[[one, other]].log_softmax(0), wanted[[one, other]].log_softmax(0)
        parts.append((known.exp() * (known - logits)).sum(0))
    return torch.stack(parts).sum(0)


class LatentRewardTerm(RewardTerm):
    """See the module's text.

    Args:
        weight, rewards, options: as of :class:`RewardTerm`, of predictions.
        proxy: what the student climbs.
        texts: text features [B, D] of the prompts [B].
        temperature: tau.
        lr_ratio: learning rate of the proxy over train.lr.
    """

    def __init__(
        self,
        weight: float,
        rewards: Rewards,
        options: RewardOptions,
        proxy: LatentReward,
        texts: Callable[[Tensor], Tensor],
        temperature: float,
        lr_ratio: float,
    ) -> None:
        super().__init__(weight, rewards, options)
        self.proxy, self.texts = proxy, texts
        self.temperature, self.lr_ratio = temperature, lr_ratio

    def judged(self, x0: Tensor, prompt: Tensor) -> Tensor:
        found: Tensor = self.proxy(x0, self.texts(prompt).to(x0.device))
        return found

    def critic(self) -> Trained:
        return Trained(extra=self.proxy, follows=True)

    def critic_loss(self, shown: Shown) -> Tensor:
        seen, rows = shown.predicted, self.rows(shown)
        latents, prompt = [each[rows].detach() for each in (seen.x0, *seen.others)], seen.of_prompts()[rows]
        with torch.no_grad():
            wanted = torch.stack([self.rewards.total(each, prompt) for each in latents])
        found = torch.stack([self.judged(each, prompt) for each in latents])
        return pairwise_divergence(wanted / self.temperature, found).sum() / (
            len(seen.x0) * self.options.share
        )
