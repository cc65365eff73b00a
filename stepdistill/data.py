"""What training reads: prompts, images with captions, pairs; as batches that any step can be asked for.

Which samples belong to a step follows from the seed and the step alone, so a resumed run reads on exactly where it
stopped and several processes read disjoint parts of the same batch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.captions import caption_of, printable, read_metadata
from stepdistill.draws import Draws, generator_for
from stepdistill.embedded import emoji_captions, emoji_images
from stepdistill.errors import UserError
from stepdistill.image_decoding import decode
from stepdistill.image_names import ENDINGS, is_image
from stepdistill.image_sources import Skipped, decode_files
from stepdistill.pairs import PairCache
from stepdistill.teacher import PipelineTeacher
from stepdistill.types import Batch, Condition, Examples

CACHE_BYTES = 2**31
"""Conditions (or latents) are computed once and kept while they are smaller than this in all."""


class Images(Protocol):
    """Images with captions."""

    @property
    def captions(self) -> list[str]: ...

    def sha256(self) -> str:
        """Of the list of images with their captions."""
        ...

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class EmbeddedImages:
    """The images the embedded teacher was trained on.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        captions: one for each.
    """

    pixels: Tensor
    captions: list[str]

    @staticmethod
    def read() -> EmbeddedImages:
        """The embedded emoji."""
        return EmbeddedImages(torch.from_numpy(emoji_images()), emoji_captions())

    def sha256(self) -> str:
        return _sha256([*self.captions, hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()])

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; they come in one size only."""
        if self.pixels.shape[1:3] != (height, width):
            raise UserError(
                f"the embedded images are {tuple(self.pixels.shape[1:3])}, the teacher draws {height, width}"
            )
        return self.pixels[list(index)].permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class ImageFolder:
    """Image files with captions, read by the rules of ``image_sources``, but turned upright.

    Attributes:
        folder: where they lie.
        files: usable images, sorted by name.
        captions: one for each, see ``captions``.
        skipped: files that look like images and are not used, with the reason.
        converted: what was done to the used ones, with their number.
        sources: where captions came from, with their number.
    """

    folder: Path
    files: list[Path]
    captions: list[str]
    skipped: list[Skipped]
    converted: Counter[str]
    sources: Counter[str]

    @staticmethod
    def read(folder: Path) -> ImageFolder:
        """Looks through a folder and all below it.

        Raises:
            UserError: when the folder is missing or holds no usable image, or a file of captions is no such.
        """
        if not folder.is_dir():
            raise UserError(f"data.images: {folder} is not a folder: give one with images")
        stated = read_metadata(folder)
        found = sorted(
            path
            for path in folder.rglob("*")
            if is_image(path.relative_to(folder).as_posix()) and path.is_file()
        )
        files, captions, skipped = [], [], []
        converted, sources = Counter[str](), Counter[str]()
        for file, (name, pixels, notes) in zip(found, decode_files(folder, found, upright=True), strict=True):
            if pixels is None:
                skipped.append(Skipped(printable(name), "; ".join(notes)))
            elif (caption := caption_of(file, stated)) is None:
                skipped.append(
                    Skipped(printable(name), "its name is not UTF-8, and there is no other caption")
                )
            else:
                files.append(file)
                captions.append(caption.text)
                sources[caption.source] += 1
                converted.update(notes)
        if not files:
            raise UserError(
                f"data.images: {folder} holds no usable image of {', '.join(sorted(ENDINGS))} ({len(skipped)} skipped"
                + (f": {skipped[0].name} {skipped[0].reason})" if skipped else ")")
            )
        return ImageFolder(folder, files, captions, skipped, converted, sources)

    def sha256(self) -> str:
        """Of names, sizes in bytes and captions, in their order."""
        named = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in self.files]
        return _sha256([(*each, caption) for each, caption in zip(named, self.captions, strict=True)])

    def remarks(self, most: int = 5) -> list[str]:
        """Lines that say where captions came from, what was converted and what was skipped, naming the first."""
        origins = ", ".join(f"{count} from {source}" for source, count in self.sources.items())
        lines = [f"data.images: {len(self.files)} images, captions: {origins}"]
        lines += [f"data.images: {count} images: {what}" for what, count in sorted(self.converted.items())]
        if self.skipped:
            names = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:most])
            more = "; ..." if len(self.skipped) > most else ""
            lines.append(f"data.images: {len(self.skipped)} files skipped: {names}{more}")
        return lines

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]: centre-cropped to the aspect ratio and resized with Lanczos.

        Raises:
            UserError: when a file was altered since and cannot be used any more.
        """
        rows = []
        for i in index:
            file = self.files[i]
            name, pixels, notes = decode(str(file), file.read_bytes, (height, width), upright=True)
            if pixels is None:
                raise UserError(
                    f"data.images: {name} was usable at the start of the run and {'; '.join(notes)}"
                )
            rows.append(torch.tensor(pixels).permute(2, 0, 1))
        return torch.stack(rows).float() / 127.5 - 1


class Rows:
    """Rows of named tensors computed on request, or once and for all where they fit in memory.

    Args:
        count: number of rows.
        compute: indices -> tensors with those rows.
    """

    def __init__(self, count: int, compute: Callable[[list[int]], dict[str, Tensor]]) -> None:
        self.count, self.compute = count, compute
        self.kept: dict[str, Tensor] | None = None
        first = compute([0])
        size = sum(value.numel() * value.element_size() for value in first.values()) * count
        if size <= CACHE_BYTES:
            parts = [self._cpu(list(range(i, min(i + 64, count)))) for i in range(0, count, 64)]
            self.kept = {name: torch.cat([part[name] for part in parts]) for name in first}

    def _cpu(self, index: list[int]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.compute(index).items()}

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows [B, ...] of ``index`` [B]. Outside the cache they are computed one by one, so that a row is the same
        number for number whatever stands beside it in the batch."""
        if self.kept is not None:
            return {name: value[index] for name, value in self.kept.items()}
        parts = [self.compute([int(i)]) for i in index]
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}


class Data:
    """Everything a method asked for.

    Args:
        teacher: encodes prompts and images.
        prompts: the prompts to train on.
        seed: the run's seed.
        images: images with captions, or None.
        pairs: cached pairs of the same prompts, or None.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        seed: int,
        images: Images | None = None,
        pairs: PairCache | None = None,
    ) -> None:
        self.teacher, self.seed, self.pairs = teacher, seed, pairs
        self.prompts = list(prompts)
        self._images = images
        self.conditions = Rows(
            len(self.prompts), lambda rows: dict(teacher.encode([self.prompts[i] for i in rows]).tensors)
        )
        self.images: Rows | None = None
        if images is not None:
            height, width = self._pixels()

            def encode(rows: list[int]) -> dict[str, Tensor]:
                pixels = images.load(rows, height, width).to(teacher.device)
                cond = teacher.encode([images.captions[i] for i in rows])
                return {"x0": teacher.to_latents(pixels), **cond.tensors}

            self.images = Rows(len(images.captions), encode)

    def identity(self) -> dict[str, str]:
        """SHA-256 of what batches are made of, by what the recipe calls it: a run goes on with the very same alone."""
        found = {"teacher": self.teacher.fingerprint(), "data.prompts": _sha256(self.prompts)}
        return found if self._images is None else {**found, "data.images": self._images.sha256()}

    def _pixels(self) -> tuple[int, int]:
        probe = self.teacher.to_images(torch.zeros(1, *self.teacher.shape, device=self.teacher.device))
        return int(probe.shape[2]), int(probe.shape[3])

    def condition(self, index: Tensor) -> Condition:
        """Conditions of the prompts ``index`` [B], on the teacher's device."""
        return Condition(self.conditions.take(index)).to(self.teacher.device)

    def batch(self, step: int, first: int, count: int, size: int) -> Batch:
        """Samples first .. first + count - 1 of the ``size`` samples of one step."""
        device = self.teacher.device
        draws = Draws(self.seed, step, first, count, device)
        position = torch.arange(step * size + first, step * size + first + count)
        cond = self.condition(_shuffled(position, len(self.prompts), self.seed, "prompts"))
        examples: dict[str, Examples] = {}
        if self.images is not None:
            rows = self.images.take(_shuffled(position, self.images.count, self.seed, "images"))
            x0 = rows.pop("x0").to(device)
            examples["images"] = Examples(x0, Condition(rows).to(device))
        if self.pairs is not None:
            index = _shuffled(position, self.pairs.count, self.seed, "pairs")
            examples["pairs"] = Examples(
                self.pairs.clean(index).to(device),
                self.condition(self.pairs.prompt_index[index]),
                self.pairs.noise(index).to(device),
                None if (states := self.pairs.states(index)) is None else states.to(device),
            )
        return Batch(draws, draws.normal("noise", self.teacher.shape), cond, **examples)


def _sha256(rows: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@lru_cache(maxsize=16)
def _permutation(count: int, seed: int, stream: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, "order", stream, epoch))


def _shuffled(position: Tensor, count: int, seed: int, stream: str) -> Tensor:
    """The sample at each position [B] of an endless sequence of reshuffled passes over ``count`` samples."""
    return torch.stack([_permutation(count, seed, stream, int(p) // count)[int(p) % count] for p in position])
