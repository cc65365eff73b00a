"""The section ``terms`` of a recipe: what is added to a method's loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stepdistill.recipes.rewards import reward_kind
from stepdistill.recipes.section import NotNegative, Section


class TermOptions(Section):
    """Terms beside any method's own loss of its student; at weight 0 they are absent. See stepdistill/losses/terms.py.

    Attributes:
        regression_weight: of the regression on cached pairs.
        regression: its distance.
        perceptual_weight: of the same regression in the features of an image network.
        perceptual: that network: ``emoji`` or ``clip:FOLDER``.
        gan_weight: of the GAN loss of the student's samples against real images.
        gan_lr_ratio: learning rate of its discriminator over train.lr.
        reward_weight: of how good the student's samples are, decoded, which is to rise. Measure by another network.
        reward: what judges them, by one name or several, whose numbers are added: ``clip:emoji`` or ``clip:FOLDER``,
            the cosine with their own prompts (PickScore and HPSv2 are such networks); ``judge``, the second embedded
            network; ``colour`` and ``ink``, rules; ``module:PACKAGE.MODULE:FUNCTION`` or ``./FILE.py:FUNCTION``, your
            own. See docs/guides/rewards.md.
        reward_of: ``sample``, as it is drawn, or ``prediction``, the one that the method's own loss is of (RG-LCD).
        reward_share: share of the samples that are decoded, one over a whole number: decoding is what it costs.
        reward_after: the method's steps before it acts.
        reward_last_call: whether the gradient reaches the last call of a drawing alone, or all of them.
        reward_below: of predictions, the greatest time of those it is of: from nearly pure noise they are a blur.
        reward_bounded: whether its gradient on each sample is no larger than that of the method's own loss there.
        reward_target: what is enough: relu(target - reward) is to fall then (Hyper-SD). None has no end.
        reward_proxy: whether a small network of latents learns the reward, and is what the student climbs (RG-LCD).
        reward_temperature: of the differences that it learns.
        reward_lr_ratio: its learning rate over train.lr.
    """

    regression_weight: Annotated[float, Field(ge=0)] = 0.0
    regression: Literal["l2", "l1", "huber"] = "l2"
    perceptual_weight: Annotated[float, Field(ge=0)] = 0.0
    perceptual: str = "emoji"
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    gan_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    reward_weight: Annotated[float, Field(ge=0)] = 0.0
    reward: str | tuple[str, ...] = "clip:emoji"
    reward_of: Literal["sample", "prediction"] = "sample"
    reward_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    reward_after: NotNegative = 0
    reward_last_call: bool = True
    reward_below: Annotated[float, Field(gt=0, le=1)] = 1.0
    reward_bounded: bool = False
    reward_target: float | None = None
    reward_proxy: bool = False
    reward_temperature: Annotated[float, Field(gt=0)] = 1.0
    reward_lr_ratio: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("reward")
    @classmethod
    def _known(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        kinds = [reward_kind(name) for name in ((names,) if isinstance(names, str) else names)]
        if not kinds or kinds.count("file") > 1:
            raise ValueError("give one reward or more, of them one file at most, as a run keeps a copy of it")
        return names

    @field_validator("reward_share")
    @classmethod
    def _one_over(cls, share: float) -> float:
        if abs(1 / share - round(1 / share)) > 0.01:
            raise ValueError(f"reward_share must be one over a whole number, such as 0.25; found {share:g}")
        return share

    @model_validator(mode="after")
    def _check(self) -> TermOptions:
        if self.reward_of == "sample" and (self.reward_below < 1 or self.reward_proxy):
            said = "reward_proxy is true" if self.reward_proxy else f"reward_below is {self.reward_below:g}"
            raise ValueError(
                f"{said}, which is for predictions: set reward_of to prediction, or leave it out"
            )
        if not self.reward_last_call and (self.reward_of == "prediction" or self.reward_bounded):
            raise ValueError(
                "reward_last_call is false, which is for samples drawn for the reward alone: leave reward_of and "
                "reward_bounded out, or set it to true"
            )
        return self

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of the rewards."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @field_validator("perceptual")
    @classmethod
    def _has_a_graph(cls, name: str) -> str:
        if name != "emoji" and not name.startswith("clip:"):
            raise ValueError("a loss needs a network with a graph: give emoji or clip:FOLDER")
        return name

    def networks(self, rewarded: bool = False) -> dict[str, str]:
        """The feature networks that the terms look through, and the keys that say so.

        Args:
            rewarded: whether the method reads the rewards for itself, whatever the term's weight.
        """
        found: dict[str, str] = {}
        for key, looks, names in (
            ("perceptual", self.perceptual_weight, (self.perceptual,)),
            ("reward", self.reward_weight or rewarded, self.rewards),
        ):
            for name in names if looks else ():
                network = "emoji" if name == "clip:emoji" else name
                if network in ("emoji", "judge") or network.startswith("clip:"):  # the others are no networks
                    found[network] = ", ".join(filter(None, (found.get(network), f"terms.{key}")))
        return found

    @property
    def needs(self) -> frozenset[str]:
        """What the terms ask of the data."""
        pairs = {"pairs", "states"} if self.regression_weight or self.perceptual_weight else set()
        return frozenset(pairs | ({"images"} if self.gan_weight else set()))
