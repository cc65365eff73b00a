"""What training reads: prompts, images with captions, pairs; as batches that any step can be asked for.

Which samples belong to a step follows from the seed and the step alone, so a resumed run reads on exactly where it
stopped and several processes read disjoint parts of the same batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data.buckets import shuffled, turn
from stepdistill.data.conditions import Conditions, cached_at
from stepdistill.data.latents import Latents
from stepdistill.data.pairs import PairCache
from stepdistill.data.row_cache import RowCache
from stepdistill.data.sizes import check_rooms
from stepdistill.data.texts import rows_sha256
from stepdistill.data.training_images import Images
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.networks.tiles import tiles_of
from stepdistill.system.log import say
from stepdistill.system.memory import sent
from stepdistill.system.prefetch import ahead
from stepdistill.system.processes import ALONE, Processes


class Data:
    """Everything a method asked for: what is to be made of it is told, the disk looked at, then it is made.

    Args:
        teacher: encodes prompts and images.
        prompts: the prompts to train on.
        seed: the run's seed.
        images: images or videos with captions, as the teacher draws the one or the other; or None.
        pairs: cached pairs of the same prompts, or None.
        processes: who share the work; each is to make this.
        remake: whether damaged files of a cache are made again.
        rich: what is said of each prompt in full, as many as prompts, or None.
        buckets: the sizes that images are brought to; a batch is of one of them. None brings all to the teacher's.
        group: consecutive samples of a step that are of one prompt.
        part: numbers of the prompts that are trained on; None is all.
        part_pairs: whether pairs are those of these prompts alone, too.

    Raises:
        UserError: no pair is of these prompts.
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
        buckets: Sequence[Size] | None = None,
        group: int = 1,
        rich: Sequence[str] | None = None,
        part: Tensor | None = None,
        part_pairs: bool = False,
    ) -> None:
        self.teacher, self.seed, self.pairs, self.group = teacher, seed, pairs, group
        self._part = torch.arange(len(prompts)) if part is None else part
        self.count = len(self._part)
        self._own_pairs: Tensor | None = None
        if pairs is not None:
            numbers = torch.arange(pairs.count)
            mine = torch.isin(pairs.prompt_index[: pairs.count], self._part) if part_pairs else None
            self._own_pairs = numbers if mine is None else numbers[mine]
            if not len(self._own_pairs):
                raise UserError(
                    f"none of the {pairs.count} pairs is of a prompt of data.part: set options.pairs higher, or "
                    "data.part_pairs=whole"
                )
        self.conditions = Conditions(teacher, prompts, "prompts", remake)
        self._rich = None if rich is None else Conditions(teacher, rich, "rich prompts", remake)
        self.images: Latents | None = None
        self._images, self._captions = images, self.conditions
        self._told: list[Mapping[str, Tensor]] = []
        if images is not None:
            sizes, codec = buckets or [teacher.size], teacher.codec
            if rows_sha256(images.captions) != self.conditions.sha256:
                self._captions = Conditions(teacher, images.captions, "captions", remake)

            def encode(pixels: Tensor) -> Tensor:
                pixels = pixels.to(teacher.device)
                return codec.to_states(pixels if pixels.ndim == 5 else pixels[:, None])

            def place() -> Path:
                source = f"{images.sha256()} {' '.join(map(str, sizes))}"
                if tiles := tiles_of(teacher.pipe.components.get("vae")):
                    source += f" {sorted(tiles.items())}"  # their seams are in the latents
                return cached_at("latents", teacher, teacher.vae_fingerprint(), source)

            self.images = Latents(images, encode, codec.shape, sizes, place, remake)
            if buckets:
                names = teacher.family.size_conditions
                some = [replace(codec, size=size).encode([prompts[0]]).tensors for size in sizes if names]
                self._told = [{name: each[name] for name in names & each.keys()} for each in some]
        self._buckets = buckets is not None
        texts = (self.conditions, self._captions, *([self._rich] if self._rich else []))
        self._caches = list(dict.fromkeys(each.rows for each in texts))
        every: list[RowCache | Latents] = [*self._caches, *([self.images] if self.images else [])]
        missing = [*(cache.wanted() for cache in every), pairs.wanted() if pairs else None]
        check_rooms(missing, say if processes.main else lambda line: None)
        for cache in every:
            cache.make(processes)

    def identity(self) -> dict[str, str]:
        """SHA-256 of what batches are made of, by what the recipe calls it: a run goes on with the very same alone."""
        found = {"teacher": self.teacher.fingerprint(), "data.prompts": self.conditions.sha256}
        if self._rich is not None:
            found["data.rich"] = self._rich.sha256
        return found if self._images is None else {**found, "data.images": self._images.sha256()}

    @property
    def skipped(self) -> int:
        """Images that could not be read."""
        return len(self.images.skipped) if self.images else 0

    def remarks(self) -> list[str]:
        """Lines that say what became of the images."""
        if self.images is None:
            return []
        lines = self.images.remarks()
        if self._buckets:
            sizes = zip(self.images.sizes, self.images.counts, strict=True)
            each = ", ".join(f"{count} of {size}" for size, count in sizes if count)
            lines.append(f"data.buckets: {each}")
        return lines

    def condition(self, index: Tensor) -> Condition:
        """Conditions of the prompts ``index`` [B], on the teacher's device."""
        return self.conditions.take(index).to(self.teacher.device)

    def batch(self, step: int, first: int, count: int, size: int) -> Batch:
        """Samples first .. first + count - 1 of the ``size`` samples of one step."""
        device = self.teacher.device
        draws = Draws(self.seed, step, first, count, device)
        position = torch.arange(step * size + first, step * size + first + count)
        prompt = self._part[shuffled(position // self.group, self.count, self.seed, "prompts")]
        cond, shape = self.condition(prompt), self.teacher.codec.shape
        examples: dict[str, Examples] = {}
        if self.images is not None:
            bucket, stream = 0, "images"
            if self._buckets:
                bucket, every = turn(self.images.counts, step, size, self.seed)
                position, stream = every[first : first + count], f"images {bucket}"
            index = shuffled(position, self.images.counts[bucket], self.seed, stream)
            x0, number = self.images.take(bucket, index)
            whose = number if self._captions is self.conditions else None
            images = Examples(
                sent(x0, device), self._captions.take(number).to(device), prompt=whose, number=number
            )
            examples["images"] = images
            if self._buckets:
                shape, told = tuple(x0.shape[1:]), self._told[bucket] if self._told else {}
                cond = _with_rows(cond, told)
                examples["images"] = replace(
                    examples["images"], cond=_with_rows(examples["images"].cond, told)
                )
        if self.pairs is not None:
            assert self._own_pairs is not None
            index = self._own_pairs[shuffled(position, len(self._own_pairs), self.seed, "pairs")]
            whose = self.pairs.prompt_index[index]
            examples["pairs"] = Examples(
                sent(self.pairs.clean(index), device),
                self.condition(whose),
                self.pairs.noise(index),
                None if (states := self.pairs.states(index)) is None else sent(states, device),
                whose,
            )
        rich = None if self._rich is None else self._rich.take(prompt).to(device)
        return Batch(draws, shape, cond, prompt, **examples, group=self.group, rich=rich)

    def batches(self, steps: range, first: int, count: int, size: int) -> Generator[Batch]:
        """:meth:`batch` of the steps, one after the other; each is made while the one before it is used, where that
        saves time: where rows come from the disk, or go to a GPU. Closing it ends the thread that makes them."""
        device = self.teacher.device
        on_disk = any(cache.on_disk for cache in self._caches) or (self.images and self.images.on_disk)
        apart = device.type == "cuda" or bool(on_disk)

        def made() -> Iterator[Batch]:
            # What belongs to a thread is set in the one that makes them.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                for step in steps:
                    yield self.batch(step, first, count, size)

        return ahead(made(), depth=int(apart))


def _with_rows(cond: Condition, told: Mapping[str, Tensor]) -> Condition:
    """The condition with some of its tensors replaced by one row [1, ...] for all samples."""
    own = {name: row.expand_as(cond[name]).to(cond[name]) for name, row in told.items()}
    return Condition({**cond.tensors, **own})
