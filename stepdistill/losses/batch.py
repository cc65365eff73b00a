"""What one call of a loss sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.families.condition import Condition


@dataclass(frozen=True)
class Examples:
    """Clean latents with their conditions: real images, or teacher samples with the noise they came from.

    Attributes:
        x0: clean states [B, ...], in the network's scale.
        cond: their conditions.
        noise: for pairs, the noise [B, ...] the teacher started from; None for images.
        states: for pairs, the states [B, K, ...] at the method's ``pair_times``, where it asked for them.
        prompt: [B] on the CPU, which of the run's prompts each is; None where their captions are others.
        number: for images, [B] on the CPU, which of all captions each has.
    """

    x0: Tensor
    cond: Condition
    noise: Tensor | None = None
    states: Tensor | None = None
    prompt: Tensor | None = None
    number: Tensor | None = None

    def part(self, rows: slice) -> Examples:
        """The examples of a slice."""
        more = (None if value is None else value[rows] for value in self._further())
        return Examples(self.x0[rows], self.cond.rows(rows), *more)

    def _further(self) -> tuple[Tensor | None, ...]:
        return self.noise, self.states, self.prompt, self.number


@dataclass(frozen=True)
class Batch:
    """What one call of a method's loss sees.

    Attributes:
        draws: the random numbers of these samples at this step; a method draws every further number from it.
        shape: of one sample's state, without B.
        cond: conditions of the prompts drawn for this step.
        prompt: [B] on the CPU, which of the run's prompts each is: rewards look their texts up by it.
        images: real images, where the method needs them.
        rich: conditions of what ``data.rich`` says of the same prompts, where the method needs them.
        pairs: cached (noise, teacher sample) pairs, where the method needs them.
        group: consecutive rows that share a prompt, ``train.group``; every part of a batch has whole groups.
    """

    draws: Draws
    shape: tuple[int, ...]
    cond: Condition
    prompt: Tensor
    images: Examples | None = None
    pairs: Examples | None = None
    group: int = 1
    rich: Condition | None = None

    @cached_property
    def noise(self) -> Tensor:
        """Starting noise [B, ...], drawn where a method asks for it."""
        return self.draws.normal("noise", self.shape)

    def fresh(self, call: int) -> Tensor:
        """Noise [B, ...] for the re-noising after network call ``call`` of a rollout."""
        return self.draws.normal(f"renoise {call}", self.shape)

    def split(self, parts: int) -> list[Batch]:
        """Equal consecutive parts, of whole groups; the mean of their losses is the loss of the whole."""
        if parts == 1:
            return [self]
        size = self.draws.count // parts
        if size * parts != self.draws.count:
            raise ValueError(f"a batch of {self.draws.count} does not split into {parts} equal parts")
        if size % self.group:
            raise ValueError(f"parts of {size} samples would tear groups of {self.group}")
        return [self._part(i * size, size) for i in range(parts)]

    def _part(self, start: int, size: int) -> Batch:
        rows = slice(start, start + size)
        return replace(
            self,
            draws=self.draws.part(start, size),
            cond=self.cond.rows(rows),
            prompt=self.prompt[rows],
            images=self.images and self.images.part(rows),
            rich=None if self.rich is None else self.rich.rows(rows),
            pairs=self.pairs and self.pairs.part(rows),
        )
