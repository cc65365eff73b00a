"""What a run is watched for: each sign in a plain sentence, its bound with the reason for it, and its cure. Imports no
torch.

No bound is a paper's: what a reason calls seen was seen in the runs that tests/injections.py makes, the other bounds
follow from what the number would be in a run without the fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev
from types import MappingProxyType
from typing import Any

from stepdistill.recipes.health_options import SignName

PREFIX = "health_"
"""Of a look's numbers in stats.jsonl."""


@dataclass(frozen=True)
class Sign:
    """A sign that a run is unwell.

    Attributes:
        said: what is seen, with places for ``value``, ``bound``, ``network`` and ``where``.
        bound: where it begins.
        why: the reason for the bound.
        cure: what to change.
        worse: by how much a number must also have got worse than it was at its best: a student may start far from its
            teacher, and is unwell where it moves away from it again. 0 where the bound alone decides.
        looks: one after the other that must find it.
    """

    said: str
    bound: float
    why: str
    cure: str
    worse: float = 0.0
    looks: int = 1

    def sentence(self, name: str, value: float = 0.0, network: str = "", where: str = "") -> str:
        """``name: what is seen``."""
        return f"{name}: " + self.said.format(value=value, bound=self.bound, network=network, where=where)


SIGNS: Mapping[SignName, Sign] = MappingProxyType(
    {
        "not_finite": Sign(
            "the {where} of the {network} is not a finite number",
            0.0,
            "no number that follows from it is one either",
            "lower train.lr or train.clip, or set train.precision=float32; look at the data that it came from",
        ),
        "rate": Sign(
            "an update moves the {network} by {value:.1%} of its weights",
            0.05,
            "at 5 % an update twenty of them replace the weights; 0.3 % is the most that was seen in a healthy run",
            "lower train.lr, or raise train.warmup",
        ),
        "gradients": Sign(
            "gradients of the {network} grew {value:.0f} times as large",
            8.0,
            "medians of 8 updates over those of 24 to 48 before them, of one phase, where above all of these: healthy "
            "runs stayed below 3",
            "lower train.lr, or train.clip",
        ),
        "loss": Sign(
            "the loss of the {network} grew {value:.0f} times as large",
            10.0,
            "medians as for gradients; losses of schedules that turn something on grow 3 times",
            "lower train.lr; in a method of your own, look at the loss's sign",
        ),
        "still": Sign(
            "the {network} was updated and did not move",
            0.0,
            "an optimiser moves every weight that has a gradient",
            "look at its learning rate (options.fake_lr_ratio and its kin), and whether a gradient reaches it",
        ),
        "lag": Sign(
            "the {network} is off by {value:.2f} times the teacher's error on the student's samples",
            2.0,
            "it starts as the teacher, at 1, and learns these very samples; 1.7 was seen in healthy runs with as many "
            "updates as the student (the geometric mean over low, middle and high noise: a loss in eps says little of "
            "the last)",
            "more options.fake_updates, a higher options.fake_lr_ratio, or a lower train.lr",
            looks=2,
        ),
        "away": Sign(
            "the student moves away from where the teacher would have it (cosine {value:.2f})",
            -0.2,
            "against the field of the two networks it is above 0 on average over samples",
            "in a method of your own, look at the sign of its loss; else lower train.lr",
            looks=2,
        ),
        "denoising": Sign(
            "the {network} denoises {where} noise {value:.1f} times as badly as a guess that knows mean and deviation "
            "alone",
            1.25,
            "any network that was told the right time does better than that guess",
            "look at the network's time (its scale, and whether it counts from 0 or from 1) and at its kind of output",
            looks=2,
        ),
        "teacher": Sign(
            "the frozen teacher answers otherwise than at the first look (by {value:.0%})",
            0.05,
            "the same states have the same answer; rounding makes less than 1 %",
            "look at what changes the teacher: its weights, its time, its guidance, its precision",
        ),
        "collapse": Sign(
            "samples of {where} differ {value:.2f} times as much as the teacher's",
            0.5,
            "half of the teacher's difference is seen by eye",
            "lower train.lr; more options.fake_updates, or a warm start on pairs; look at whether prompts reach the "
            "network",
            worse=0.6,
            looks=2,
        ),
        "motion": Sign(
            "the student's videos move {value:.2f} times as much as the teacher's",
            0.5,
            "as for collapse, of the frames of one video: they come to be one picture",
            "lower train.lr; more options.fake_updates; phased_dmd, which trains high noise by itself",
            worse=0.6,
            looks=2,
        ),
        "oversaturation": Sign(
            "{value:.0%} of the student's latents lie where 1% of the teacher's do",
            0.06,
            "6 times the teacher's share; a student that is 1.4 times as wide has it",
            "lower options.guidance or options.score_guidance, or set options.guidance_rescale",
            worse=0.03,
            looks=2,
        ),
        "guidance": Sign(
            "guided predictions deviate {value:.1f} times as much as unguided ones and the teacher's samples ({where} "
            "noise)",
            1.5,
            "what a prediction is the mean of deviates more than the prediction itself: above 1 it is guidance",
            "lower options.score_guidance or options.guidance, set options.score_guidance_interval to [0, 0.7], or "
            "options.guidance_rescale",
            worse=0.3,
        ),
        "spectrum": Sign(
            "the student has {value:.1f} times the teacher's share of high frequencies",
            2.0,
            "twice, or half, is grain or blur that is seen by eye",
            "grain: a lower train.lr, a GAN term with less weight; blur: more steps, dmd after regression",
            worse=0.35,
            looks=2,
        ),
        "drift": Sign(
            "the student's latents have {where} the teacher's ({value:.2f})",
            0.75,
            "a mean that is off by 0.75 deviations, or a deviation that is 2.1 times the teacher's: 0.5 and 1.3 were "
            "seen in healthy runs",
            "lower train.lr; a follower that keeps up (options.fake_updates)",
            worse=0.4,
            looks=2,
        ),
        "average": Sign(
            "the averaged weights follow {value:.2f} times as fast as their decay says",
            0.1,
            "a sum of updates that all went one way makes it 1 or more",
            "look at train.average; what is exported is the average",
        ),
        "data": Sign(
            "the {where} of a batch differ {value:.3f} times as much as the teacher's samples",
            0.05,
            "a data set of one subject still differs by a tenth; this is one example over and over",
            "look at data.images and data.prompts: how many different ones are there?",
        ),
    }
)


OF_THE_TEACHERS: frozenset[SignName] = frozenset({"away", "oversaturation", "spectrum", "drift"})
"""Signs that the student's samples are not as the teacher's, which one that is led elsewhere need not be."""


@dataclass(frozen=True)
class Trouble:
    """A sign that was seen.

    Attributes:
        sign: its name.
        sentence: ``name: what is seen``.
        network: whose rate it is about, by its name in ``trained``; None is the student's.
    """

    sign: SignName
    sentence: str
    network: str | None = None


def growth(before: Sequence[float], recent: Sequence[float]) -> float:
    """How many times as large numbers are as they were, by medians; 0 where they are not above all that they were: some
    go up and down by themselves, such as gradients over rollouts of one to four steps."""
    level, now = median(before), median(recent)
    return now / level if level > 0 and min(recent) > 0 and now > max(before) else 0.0


def plateau(rows: Sequence[Mapping[str, Any]], network: str = "student", least: int = 200) -> int | None:
    """The update since which the loss of a network no longer falls; None where it falls, or nobody can tell.

    Of its last phase's updates the second half is split in two: where their means differ by less than their standard
    errors, at a rate that was not falling, more updates would be in vain. It is worth knowing, and no sign that
    something is wrong: adversarial losses need not fall at all.

    Args:
        rows: of stats.jsonl.
        network: whose.
        least: updates below which nothing is said.
    """
    own = [row for row in rows if row.get("network") == network and isinstance(row.get("loss"), (int, float))]
    own = [row for row in own if row.get("phase") == own[-1].get("phase")]
    half = own[len(own) // 2 :]
    if len(own) < least or half[-1].get("lr", 0) < 0.9 * half[0].get("lr", 0):
        return None
    first, second = ([float(row["loss"]) for row in part] for part in _halves(half))
    error = sqrt(stdev(first) ** 2 / len(first) + stdev(second) ** 2 / len(second))
    return int(half[0]["update"]) if fmean(first) - fmean(second) < error else None


def _halves(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], ...]:
    middle = len(rows) // 2
    return rows[:middle], rows[middle:]
