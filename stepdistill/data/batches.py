"""What training reads: prompts, images with captions, pairs; as batches that any step can be asked for.

Which samples belong to a step follows from the seed and the step alone, so a resumed run reads on exactly where it
stopped and several processes read disjoint parts of the same batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data.conditions import Conditions, cached_at
from stepdistill.data.pairs import PairCache
from stepdistill.data.row_cache import RowCache
from stepdistill.data.texts import rows_sha256
from stepdistill.data.training_images import Images
from stepdistill.diffusion.draws import Draws, generator_for
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.memory import sent
from stepdistill.system.prefetch import ahead
from stepdistill.system.processes import ALONE, Processes


class Data:
    """Everything a method asked for.

    Args:
        teacher: encodes prompts and images.
        prompts: the prompts to train on.
        seed: the run's seed.
        images: images with captions, or None.
        pairs: cached pairs of the same prompts, or None.
        processes: who share the work; each is to make this.
        remake: whether damaged files of a cache are made again.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        seed: int,
        images: Images | None = None,
        pairs: PairCache | None = None,
        processes: Processes = ALONE,
        remake: bool = False,
    ) -> None:
        self.teacher, self.seed, self.pairs = teacher, seed, pairs
        self.count = len(prompts)
        self.conditions = Conditions(teacher, prompts, "prompts", processes, remake)
        self.images: RowCache | None = None
        self._images, self._captions = images, self.conditions
        if images is not None:
            codec = teacher.codec
            if rows_sha256(images.captions) != self.conditions.sha256:
                self._captions = Conditions(teacher, images.captions, "captions", processes, remake)

            def encode(rows: list[int]) -> dict[str, Tensor]:
                pixels = images.load(rows, codec.size.height, codec.size.width).to(teacher.device)
                return {"x0": codec.to_states(pixels[:, None])}

            def place() -> Path:
                return cached_at("latents", teacher, teacher.vae_fingerprint(), images.sha256())

            self.images = RowCache(len(images.captions), encode, place, "latents", processes, remake)

    def identity(self) -> dict[str, str]:
        """SHA-256 of what batches are made of, by what the recipe calls it: a run goes on with the very same alone."""
        found = {"teacher": self.teacher.fingerprint(), "data.prompts": self.conditions.sha256}
        return found if self._images is None else {**found, "data.images": self._images.sha256()}

    def condition(self, index: Tensor) -> Condition:
        """Conditions of the prompts ``index`` [B], on the teacher's device."""
        return self.conditions.take(index).to(self.teacher.device)

    def batch(self, step: int, first: int, count: int, size: int) -> Batch:
        """Samples first .. first + count - 1 of the ``size`` samples of one step."""
        device = self.teacher.device
        draws = Draws(self.seed, step, first, count, device)
        position = torch.arange(step * size + first, step * size + first + count)
        prompt = _shuffled(position, self.count, self.seed, "prompts")
        examples: dict[str, Examples] = {}
        if self.images is not None:
            index = _shuffled(position, self.images.count, self.seed, "images")
            x0 = sent(self.images.take(index)["x0"], device)
            examples["images"] = Examples(x0, self._captions.take(index).to(device))
        if self.pairs is not None:
            index = _shuffled(position, self.pairs.count, self.seed, "pairs")
            examples["pairs"] = Examples(
                sent(self.pairs.clean(index), device),
                self.condition(self.pairs.prompt_index[index]),
                self.pairs.noise(index),
                None if (states := self.pairs.states(index)) is None else sent(states, device),
            )
        return Batch(draws, self.teacher.codec.shape, self.condition(prompt), prompt, **examples)

    def batches(self, steps: range, first: int, count: int, size: int) -> Generator[Batch]:
        """:meth:`batch` of the steps, one after the other; each is made while the one before it is used, where that
        saves time: where rows come from the disk, or go to a GPU. Closing it ends the thread that makes them."""
        device = self.teacher.device
        rows = [rows for rows in (self.conditions, self._captions, self.images) if rows is not None]
        apart = device.type == "cuda" or any(cache.on_disk for cache in rows)

        def made() -> Iterator[Batch]:
            # What belongs to a thread is set in the one that makes them.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                for step in steps:
                    yield self.batch(step, first, count, size)

        return ahead(made(), depth=int(apart))


@lru_cache(maxsize=6)
def _permutation(count: int, seed: int, stream: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, "order", stream, epoch))


def _shuffled(position: Tensor, count: int, seed: int, stream: str) -> Tensor:
    """The sample at each of the positions [B], one after the other, of an endless sequence of reshuffled passes over
    ``count`` samples."""
    first, last = (int(position[i]) // count for i in (0, -1))
    passes = [_permutation(count, seed, stream, epoch) for epoch in range(first, last + 1)]
    return (passes[0] if first == last else torch.cat(passes))[position - first * count]
