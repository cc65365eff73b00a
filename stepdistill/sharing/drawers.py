"""Pipelines that draw one picture at a time, each with the step counts that it can draw in."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError, first_line
from stepdistill.export.verify import read_manifest, student_folder
from stepdistill.networks.own_call import refuse_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

TEACHER_STEPS = tuple(range(1, 51))
"""What the teacher may be asked for."""


@dataclass(frozen=True)
class Drawing:
    """A picture.

    Attributes:
        image: itself; of a video its middle frame.
        steps: network calls that it took.
        seconds: that it took, when all the device was given is done.
    """

    image: Image
    steps: int
    seconds: float


@dataclass
class Drawer:
    """A pipeline that draws.

    Attributes:
        name: what it is called on a page.
        pipe: the pipeline.
        step_counts: that it may draw in, ascending.
        steps: how many it takes unless another count is asked for.
        call: the arguments of its call, without prompt, steps and seed.
        condition: which argument takes the prompt; None for a pipeline that takes none.
    """

    name: str
    pipe: Any
    step_counts: tuple[int, ...]
    steps: int
    call: Mapping[str, Any]
    condition: str | None

    def draw(self, prompt: str, seed: int, steps: int | None = None) -> Drawing:
        """One picture.

        Args:
            prompt: a text; for a pipeline conditioned on classes, the number of one.
            seed: of the CPU generator, 0 or more.
            steps: one of ``step_counts``; None is its own.

        Raises:
            UserError: it cannot draw so.
        """
        import torch

        from stepdistill.families.plain_calls import drawing_call

        steps = self.steps if steps is None else steps
        if steps not in self.step_counts:
            counts = ", ".join(map(str, self.step_counts))
            raise UserError(f"{self.name} draws in {counts} step(s), not in {steps}")
        call = drawing_call(inspect.signature(self.pipe.__call__).parameters.keys(), steps, self.call)
        if self.condition == "class_labels":
            if not prompt.strip().isdigit():
                raise UserError(f"{self.name} draws classes: give the number of one, not {prompt!r}")
            call["class_labels"] = [int(prompt)]
        elif self.condition is not None:
            call[self.condition] = [prompt]
        generator = [torch.Generator("cpu").manual_seed(seed)]
        begin = self._now()
        try:
            with torch.no_grad():
                drawn = self.pipe(**call, generator=generator, output_type="pil", return_dict=False)[0][0]
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.name} did not draw: {first_line(error)}") from error
        seconds = self._now() - begin
        return Drawing(drawn[len(drawn) // 2] if isinstance(drawn, list) else drawn, steps, seconds)

    def _now(self) -> float:
        if self.pipe.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def step_counts_of(folder: Path) -> tuple[int, ...]:
    """The step counts that a student folder's student was trained for, ascending.

    Raises:
        UserError: its manifest cannot be read.
    """
    manifest = read_manifest(folder)
    return tuple(manifest.get("step_counts", [manifest["call"]["num_inference_steps"]]))


def student_drawer(folder: Path, name: str, device: str | None = None) -> Drawer:
    """The student of a folder, called as its verification pictures were.

    Args:
        folder: of the student.
        name: what it is called.
        device: None takes a GPU where there is one.

    Raises:
        UserError: it cannot be loaded.
    """
    from stepdistill.networks.loading import load_pipeline

    call = dict(read_manifest(folder)["call"])
    refuse_pictures(call, "demo")
    counts, steps = step_counts_of(folder), int(call.pop("num_inference_steps"))
    condition = next((key for key in ("prompt", "class_labels") if key in call), None)
    for key in ("prompt", "class_labels", "batch_size"):
        call.pop(key, None)
    pipe, _ = load_pipeline(folder, device, filters=True)
    return Drawer(name, pipe, counts, steps, call, condition)


def teacher_drawer(teacher: str, guidance: float | None = None, device: str | None = None) -> Drawer:
    """The teacher, called as its pipeline is by default.

    Args:
        teacher: an embedded name, a folder or a Hub name.
        guidance: scale of its guidance; None is its pipeline's own.
        device: None takes a GPU where there is one.

    Raises:
        UserError: it cannot be loaded, or has no guidance.
    """
    import torch

    from stepdistill.networks.loading import load_pipeline, load_teacher

    pipe, _ = load_pipeline(load_teacher(teacher), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    takes = inspect.signature(pipe.__call__).parameters
    if guidance is not None and "guidance_scale" not in takes:
        raise UserError(
            f"--guidance is {guidance:g}, but {type(pipe).__name__} has no guidance: leave it out"
        )
    call = {} if guidance is None else {"guidance_scale": guidance}
    condition = next((key for key in ("prompt", "class_labels") if key in takes), None)
    return Drawer(f"teacher {Path(teacher).name}", pipe, TEACHER_STEPS, 25, call, condition)


def first_prompt(folder: Path) -> str:
    """The first prompt, or class, of a student's verification pictures; "" where it has none."""
    call = read_manifest(folder)["call"]
    return str((call.get("prompt") or call.get("class_labels") or [""])[0])


def short_names(students: Sequence[str]) -> dict[str, Path]:
    """What each of several students is called, and its folder: the name of its run, as far as that tells them apart.

    Raises:
        UserError: one is no student, or is named twice.
    """
    folders = [student_folder(student) for student in students]
    for given, folder in zip(students, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{given} is named twice")
    names = [folder.parent.name if folder.name == "student" else folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = list(students)
    return dict(zip(names, folders, strict=True))
