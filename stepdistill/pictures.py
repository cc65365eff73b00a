"""Pictures of a run: labelled rows of the same prompts and seeds, and the contact sheets drawn while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stepdistill.ema import Ema
from stepdistill.export import averaged, draw_as_pipeline, to_uint8
from stepdistill.health import Vitals
from stepdistill.loop import Seen
from stepdistill.sampler import Sampler, schedule_times
from stepdistill.solvers import solve
from stepdistill.student import Student
from stepdistill.teacher import PipelineTeacher


def rows_of_pictures(rows: Sequence[tuple[str, Tensor]], tile: int = 64) -> Image.Image:
    """Rows of images uint8 [B, 3, H, W], each under its label; small ones grow by a whole factor to about ``tile``."""
    label_height, gap = 16, 2
    _, _, height, width = rows[0][1].shape
    factor = max(1, tile // max(height, width))
    height, width = height * factor, width * factor
    columns = max(len(images) for _, images in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + label_height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows):
        top = r * (height + label_height + gap)
        pen.text((gap, top + 2), label, fill="black")
        for c, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
                (width, height), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (gap + c * (width + gap), top + label_height))
    return sheet


@torch.no_grad()
def teacher_pictures(
    teacher: PipelineTeacher, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> Tensor:
    """The teacher's pictures [B, 3, H, W] in [0, 1] after ``steps`` DDIM steps on the grid of its schedule."""
    shape = (1, *teacher.shape)
    noise = torch.cat(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )
    cond = teacher.encode(list(prompts))
    times = (*schedule_times(teacher.path, steps), 0.0)
    latents = solve(
        lambda x, t: teacher.predict(x, t, cond, guidance=guidance), noise.to(teacher.device), times, "ddim"
    )
    return teacher.to_images(latents)


class ContactSheets:
    """Draws the same prompts with the student every so often, writes them down and looks whether they are healthy.

    Args:
        folder: where ``step-00000100.png`` go.
        student, sampler, teacher: who draws, how, and who decodes.
        prompts: at least 2.
        guidance: of the teacher's pictures they are compared with.
        teacher_steps: their steps.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        sampler: Sampler,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        guidance: float,
        teacher_steps: int,
    ) -> None:
        self.folder, self.student, self.sampler, self.teacher = folder, student, sampler, teacher
        self.prompts, self.seeds = list(prompts), list(range(len(prompts)))
        drawn = teacher_pictures(teacher, self.prompts, self.seeds, teacher_steps, guidance)
        self.reference = Vitals.of(drawn)
        self.teacher_row = (f"teacher, {teacher_steps} steps", to_uint8(drawn))

    def look(self, step: int, ema: Ema | None) -> Seen:
        """Draws the sheet of one step; its numbers go to the log, its worries above the progress bar."""
        with averaged(ema):
            drawn = draw_as_pipeline(self.student, self.sampler, self.teacher, self.prompts, self.seeds)
        self.folder.mkdir(parents=True, exist_ok=True)
        label = f"student, {self.sampler.steps} step(s), after {step} updates"
        sheet = rows_of_pictures([self.teacher_row, (label, to_uint8(drawn))])
        sheet.save(self.folder / f"step-{step:08d}.png")
        vitals = Vitals.of(drawn)
        return Seen(
            {"diversity": vitals.diversity, "saturation": vitals.saturation}, vitals.worries(self.reference)
        )
