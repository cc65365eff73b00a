"""Pictures of a run: labelled rows of the same prompts and seeds, and the previews drawn while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepdistill.evaluation.video_pipelines import frame_rate
from stepdistill.networks.averages import Ema, averaged
from stepdistill.networks.codec import Codec
from stepdistill.networks.pictures import frames_as_pipeline, shown_frames, teacher_frames, to_uint8
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pages.sheets import png_of_rows
from stepdistill.pictures.given import any_named, pictures_of, words_of
from stepdistill.system.files import written_whole
from stepdistill.system.run_folder import RunFolder, moving
from stepdistill.training.health import Seen, Vitals
from stepdistill.training.moving import strips_and_videos, write_moving


class Previews:
    """Draws the same prompts with the student every so often, writes them down and looks whether they are healthy.

    Args:
        folder: of the run, which keeps them; None keeps nothing.
        student, sampler, teacher: who draws, how, and who decodes.
        prompts: at least 2.
        guidance: of the teacher's pictures they are compared with.
        teacher_steps: their steps.
        codec: encodes the prompts and decodes what is drawn; None is the teacher's.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        student: Student,
        sampler: Sampler,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        guidance: float,
        teacher_steps: int,
        codec: Codec | None = None,
    ) -> None:
        self.folder, self.student, self.sampler = folder, student, sampler
        self.codec = codec or teacher.codec
        self.prompts, self.seeds = list(prompts), list(range(len(prompts)))
        drawn, videos = strips_and_videos(
            teacher_frames(teacher, self.prompts, self.seeds, teacher_steps, guidance, self.codec)
        )
        self.reference, self.given = Vitals.of(drawn), given_row(self.codec, self.prompts)
        label = f"teacher, {teacher_steps} steps"
        self.teacher_row, self.teacher_videos = (label, to_uint8(drawn)), (label, videos)

    def look(self, update: int, ema: Ema | None) -> Seen:
        """Draws one preview; its numbers go to the log, its worries above the progress bar."""
        with averaged(ema):
            drawn, videos = strips_and_videos(
                frames_as_pipeline(self.student, self.sampler, self.codec, self.prompts, self.seeds)
            )
        if self.folder is not None:
            self.folder.pictures.mkdir(parents=True, exist_ok=True)
            steps = f"{self.sampler.steps} step{'s' * (self.sampler.steps > 1)}"
            label = f"student, {steps}, after {update} updates"
            rows = [*self.given, self.teacher_row, (label, to_uint8(drawn))]
            with written_whole(file := self.folder.preview(update)) as temporary:
                temporary.write_bytes(png_of_rows(rows, words_of(self.prompts)))
            write_moving(moving(file), [self.teacher_videos, (label, videos)], frame_rate(self.codec.pipe))
        vitals = Vitals.of(drawn)
        numbers = {
            **{"diversity": vitals.diversity, "teacher_diversity": self.reference.diversity},
            **{"saturation": vitals.saturation, "teacher_saturation": self.reference.saturation},
        }
        return Seen(numbers, vitals.worries(self.reference))


def given_row(codec: Codec, prompts: Sequence[str]) -> list[tuple[str, Tensor]]:
    """The row of the pictures that prompts are drawn from, uint8 [B, 3, H, W] as wide as :func:`strip` makes what is
    drawn; none where nothing is drawn from one."""
    size = codec.size
    if not any_named(prompts):
        return []
    pixels = [torch.from_numpy(np.array(each)) for each in pictures_of(prompts, size.height, size.width)]
    pictures = torch.stack(pixels).permute(0, 3, 1, 2)
    return [("given", pictures.repeat(1, 1, 1, len(shown_frames(size.frames))))]
