"""The terms that a recipe puts beside a method's loss, and the rewards that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.dino import DinoFeatures
from stepdistill.features.load import load_features
from stepdistill.losses.contract import MethodOptions
from stepdistill.losses.latent_reward import LatentReward, LatentRewardTerm
from stepdistill.losses.looks import Eye, Looks
from stepdistill.losses.reward_term import RewardOptions, RewardTerm
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import GanTerm, PerceptualTerm, RegressionTerm, Term
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.term_options import TermOptions
from stepdistill.training.rewards import PromptFeatures, make_reward, network_of_reward


def _decoder(recipe: Recipe, teacher: PipelineTeacher) -> Callable[[Tensor], Tensor]:
    """Clean latents to pictures [B, 3, H, W] in [0, 1], with a graph; of a video its middle frame."""
    if not teacher.family.differentiable:
        raise UserError(
            "terms.perceptual_weight, terms.reward_weight and methods that look at pictures need gradients through the "
            f"decoder, and {recipe.teacher} was recorded, which decodes by a draw of its pipeline: do without"
        )
    codec = teacher.codec

    def decode(states: Tensor) -> Tensor:
        frames = codec.to_frames(states)
        return frames[:, frames.shape[1] // 2]

    return decode


def chosen_rewards(recipe: Recipe, teacher: PipelineTeacher, prompts: Sequence[str]) -> Rewards:
    """What the recipe's ``terms.reward`` names."""
    decode, device = _decoder(recipe, teacher), teacher.device
    return Rewards(decode, tuple(make_reward(name, device, prompts) for name in recipe.terms.rewards))


def chosen_looks(recipe: Recipe, options: MethodOptions, teacher: PipelineTeacher) -> Looks:
    """What the networks see that a method's options name."""
    eyes = {}
    for spec, key in options.networks.items():
        network = load_features(spec, device=teacher.device)
        if not isinstance(network, ClipFeatures | DinoFeatures):
            raise UserError(
                f"{key} has {spec}, which gives no gradient to its pictures: take emoji, clip:FOLDER or dinov2:FOLDER"
            )
        eyes[spec] = Eye(_of_unit_pixels(network), network.dimension)
    return Looks(_decoder(recipe, teacher), eyes)


def _of_unit_pixels(network: ClipFeatures | DinoFeatures) -> Callable[[Tensor], Tensor]:
    """A network's features of pictures in [0, 1]."""
    return lambda pictures: network.embed(255 * pictures)


def _reward_term(
    options: TermOptions, rewards: Rewards, teacher: PipelineTeacher, prompts: Sequence[str]
) -> RewardTerm:
    """The term, with a proxy of its own where one is wanted."""
    how = RewardOptions(
        of=options.reward_of,
        share=options.reward_share,
        after=options.reward_after,
        last_call=options.reward_last_call,
        below=options.reward_below,
        bounded=options.reward_bounded,
        target=options.reward_target,
    )
    if not options.reward_proxy:
        return RewardTerm(options.reward_weight, rewards, how)
    named = next((name for name in options.rewards if name.startswith("clip:")), "clip:emoji")
    network = network_of_reward(named, teacher.device)
    return LatentRewardTerm(
        options.reward_weight,
        rewards,
        how,
        LatentReward(teacher.codec.shape, network.dimension),
        PromptFeatures(network, prompts),
        options.reward_temperature,
        options.reward_lr_ratio,
    )


def chosen_terms(
    recipe: Recipe, teacher: PipelineTeacher, prompts: Sequence[str], rewards: Rewards | None
) -> list[Term]:
    """The terms that have a weight."""
    options, device, terms = recipe.terms, teacher.device, list[Term]()
    if options.regression_weight:
        terms.append(RegressionTerm(options.regression_weight, options.regression))
    if options.perceptual_weight:
        network = cast(ClipFeatures, load_features(options.perceptual, device=device))
        decode = _decoder(recipe, teacher)
        terms.append(PerceptualTerm(options.perceptual_weight, lambda x: network.embed(255 * decode(x))))
    if options.gan_weight:
        terms.append(GanTerm(options.gan_weight, teacher.denoiser, options.gan_lr_ratio))
    if options.reward_weight and rewards is not None:
        terms.append(_reward_term(options, rewards, teacher, prompts))
    return terms
