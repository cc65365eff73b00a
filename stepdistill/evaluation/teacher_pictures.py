"""A teacher's own pictures, drawn once for its weights, prompts, seeds, steps, guidance and size, and kept as PNG files
in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from stepdistill.data.texts import rows_sha256
from stepdistill.diffusion.path import FlowPath
from stepdistill.evaluation.picture_folder import PictureFolder, saver
from stepdistill.networks.pictures import teacher_pictures, to_uint8
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.processes import ALONE, Processes
from stepdistill.system.shipped import cache_folder

PIXELS_AT_ONCE = 2**20
"""Of the pictures that are drawn together: one of 1024 x 1024, whose decoding takes gigabytes."""


class TeacherPictures:
    """The pictures of one step count and one guidance.

    Args:
        teacher: who draws; on DDIM steps of its own schedule, as the trainer does.
        weights: its fingerprint.
        prompts, seeds: one a picture.
        steps: network calls per picture, of twice as many samples under guidance.
        guidance: the scale.

    Attributes:
        pictures: where they lie.
        sha256: of all that they depend on.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        weights: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
    ) -> None:
        self.teacher, self.steps, self.guidance = teacher, steps, guidance
        size, path = teacher.size, teacher.path
        settings = {
            "teacher": weights,
            "solver": "ddim",
            "steps": steps,
            "guidance": guidance,
            "interval": list(teacher.guidance_interval),
            "guidance_2": teacher.guidance_2,
            "rescale": teacher.guidance_rescale,
            "shift": path.shift if isinstance(path, FlowPath) else 1.0,
            "size": [size.height, size.width, size.frames],
            "precision": str(teacher.denoiser.compute),
            "prompts_sha256": rows_sha256(prompts),
            "first_seed": seeds[0],
        }
        self.sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        folder = cache_folder() / "teacher_pictures" / self.sha256[:16]
        self.pictures = PictureFolder(folder, prompts, seeds, settings)

    @property
    def samples(self) -> int:
        """Network samples that a picture takes."""
        teacher = self.teacher
        guided = self.guidance != 1 and teacher.denoiser.guidance is None and teacher.null is not None
        return self.steps * (1 + guided)

    def draw(self, progress: Callable[[int], object], processes: Processes = ALONE) -> None:
        """Draws what is missing, each process its part. All of them must call this.

        Args:
            progress: told how many pictures were drawn.
            processes: who share the work.
        """
        pictures = self.pictures
        processes.together(lambda: pictures.claim() if processes.main else None)
        missing = [number for number in pictures.missing() if number % processes.count == processes.rank]
        prompts = pictures.prompts or ()
        with saver() as saving:
            for rows in batches(missing, self.teacher):
                some, seeds = [prompts[i] for i in rows], [pictures.seeds[i] for i in rows]
                drawn = to_uint8(teacher_pictures(self.teacher, some, seeds, self.steps, self.guidance))
                saving.settle()
                for number, picture in zip(rows, drawn.permute(0, 2, 3, 1).numpy(), strict=True):
                    saving.put(pictures.file(number), picture)
                progress(len(rows))
        processes.gather(None)
        if processes.main:
            pictures.index()

    def read(self) -> Iterator[tuple[list[int], Tensor]]:
        """Their numbers and pictures uint8 [B, 3, H, W], some at a time."""
        for rows in batches(range(len(self.pictures.seeds)), self.teacher):
            yield rows, self.pictures.read(rows)


def batches(numbers: Sequence[int], teacher: PipelineTeacher) -> Iterator[list[int]]:
    """The numbers of pictures in groups of those that are drawn at once."""
    size = teacher.size
    count = max(1, min(64, PIXELS_AT_ONCE // (size.height * size.width * size.frames)))
    for first in range(0, len(numbers), count):
        yield list(numbers[first : first + count])
