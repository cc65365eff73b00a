"""Pictures or videos of a prompts file by a student, and by its teacher from the same seeds, each into its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stepdistill.data.texts import rows_sha256
from stepdistill.errors import UserError
from stepdistill.evaluation.picture_folder import PictureFolder, saver
from stepdistill.networks.find import find_pipeline, find_teacher
from stepdistill.networks.own_call import TEACHER_STEPS, distilled_at, own_call, steps_of
from stepdistill.pages.videos import ANIMATED, FILM, check_kind
from stepdistill.system.log import bar, say
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.processes import ALONE, FAILED, Processes
from stepdistill.system.run_folder import RunFolder

PICTURE = "png"
FORMATS = (PICTURE, *(ending.removeprefix(".") for ending in (FILM, *ANIMATED)))
"""Kinds of files."""

OF_A_GRID = frozenset({"eta", "timesteps", "sigmas", "intermediate_timesteps"})
"""Arguments of a student's call that say how it steps, not what it draws."""


@dataclass(frozen=True)
class Drawer:
    """Who draws, and how it is called.

    Attributes:
        folder: of the pipeline; a Hub name of a teacher's.
        label: what it is called in messages.
        steps: network calls per picture.
        guidance: guidance_scale; None is no guidance, "own" the pipeline's own.
        trailing: see :func:`stepdistill.evaluation.evaluate.evaluate`.
        arguments: further arguments of its call.
    """

    folder: str | Path
    label: str
    steps: int
    guidance: float | Literal["own"] | None
    trailing: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)


def as_named(pipeline: str, steps: int | None = None, guidance: float | None = None) -> Drawer:
    """The pipeline of a name, as :func:`stepdistill.evaluation.sample.sample` draws it: a student by its own call, any
    other with the guidance and the spacing of steps that it has by default.

    Args:
        pipeline: as :func:`stepdistill.networks.find.find_pipeline` takes it.
        steps: None is a student's own count, and 25 of any other pipeline.
        guidance: None is that of a student's own call, and the default of any other pipeline's.

    Raises:
        UserError: no such pipeline, or a step count that the student was not trained for.
    """
    folder = find_pipeline(pipeline)
    own = own_call(folder)
    count = steps_of(own, steps)
    if own is None:
        return Drawer(folder, "teacher", count, "own" if guidance is None else guidance, False)
    if (warning := own.warning(guidance)) is not None:
        say(warning)
    scale = own.input_guidance if guidance is None else guidance
    return Drawer(folder, "student", count, scale, False, own.arguments)


def teacher_of(pipeline: str, steps: int = TEACHER_STEPS) -> Drawer:
    """The teacher of a run, with the guidance and the size that the run learnt, called as its student is otherwise.

    Args:
        pipeline: a run folder, or the student in it.
        steps: network calls per picture, at each of which guidance may make two.

    Raises:
        UserError: it is of no run, or its teacher is not to be found.
    """
    place = Path(pipeline).expanduser()
    run = RunFolder(place.parent if place.name == "student" else place)
    if not run.recipe.is_file():
        raise UserError(
            f"--teacher: {pipeline} is no run folder nor a student in one (there is no recipe.yaml), so its teacher is "
            "not known: draw the teacher by its own name"
        )
    recipe: dict[str, Any] = parse_yaml(run.recipe.read_text("utf-8")) or {}
    size = (recipe.get("data") or {}).get("size")
    own = own_call(run.student)
    told = {key: value for key, value in (own.arguments if own else {}).items() if key not in OF_A_GRID}
    told.update(zip(("height", "width", "num_frames"), size or (), strict=False))
    name = find_teacher(str(recipe.get("teacher")))
    return Drawer(name, "teacher", steps, distilled_at(run.student), True, told)


def draw_into(
    folder: Path,
    drawers: Sequence[Drawer],
    prompts: Sequence[str] | None,
    count: int,
    *,
    seed: int = 0,
    batch: int | None = None,
    kind: str = PICTURE,
    fps: float | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> dict[str, int]:
    """Draws the same ``count`` pictures or videos by each drawer into ``folder/LABEL``; those that are there are kept.

    Picture i is of prompt i (they begin again where there are fewer), from
    ``torch.Generator("cpu").manual_seed(seed + i)``, at the pipeline's own size.

    Args:
        folder: where to.
        drawers: with labels of their own.
        prompts: None for pipelines that take none; class-conditional ones draw all classes in turn.
        count: pictures of each.
        seed: of the first.
        batch: pictures drawn at a time; None is 8, and 1 of videos.
        kind: of the files: png, of a video its middle frame; or mp4, webp or gif, with all frames.
        fps: frames a second of a video; None is the pipeline's own rate, or 16.
        processes: those that draw together, each its part; all of them must call this.
        progress: show a bar.

    Returns:
        How many pictures this process drew now, by label.

    Raises:
        UserError: a kind that there is not, or that nothing installed writes; a pipeline does not load or takes no
            prompts; it draws no videos and they are asked for; or a folder holds other pictures.
        OtherProcessError: another process ended with an error.
    """
    if count < 1:
        raise UserError(f"--count is {count}, and must be 1 or more")
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: give one of {', '.join(FORMATS)}")
    if fps is not None and kind == PICTURE:
        raise UserError("--fps is of videos: give --format mp4, webp or gif with it")
    check_kind(f".{kind}")
    drawn: dict[str, int] = {}
    for drawer in drawers:
        make = partial(_Work, folder / drawer.label, drawer, prompts, count, seed, kind, fps, processes)
        work = processes.together(make)
        drawn[drawer.label] = work.draw(batch or work.batch, processes, shown=progress and processes.main)
        processes.gather(None)
        if processes.main:
            work.pictures.index()
    return drawn


class _Work:
    """One drawer's pictures, and what of them this process draws."""

    def __init__(
        self,
        folder: Path,
        drawer: Drawer,
        prompts: Sequence[str] | None,
        count: int,
        seed: int,
        kind: str,
        fps: float | None,
        processes: Processes,
    ) -> None:
        from stepdistill.evaluation.drawing import Drawing
        from stepdistill.evaluation.suite import Suite
        from stepdistill.evaluation.video_pipelines import draws_videos, frame_rate
        from stepdistill.networks.fingerprint import weights_hash
        from stepdistill.networks.loading import load_pipeline, load_teacher

        texts = None if prompts is None else [prompts[i % len(prompts)] for i in range(count)]
        if Path(drawer.folder).is_dir():
            pipe, _ = load_pipeline(drawer.folder, processes.device)
            weights = weights_hash(drawer.folder)
        else:  # of the Hub
            pipe, _ = load_pipeline(load_teacher(str(drawer.folder)), processes.device)
            weights = weights_hash(pipe)
        suite = Suite(
            name="sample", version=1, n=0, first_seed=seed, resolution=0, draw_resolution="own",
            reference="", kid=False, clip_score=False, teacher_steps=1,
        )  # fmt: skip
        suite = suite.model_copy(update={"n": count})  # of a picture or two no distance is asked
        moves = kind != PICTURE
        if moves and not draws_videos(pipe):
            raise UserError(f"{type(pipe).__name__} draws pictures, not videos: give --format {PICTURE}")
        if draws_videos(pipe) and not moves and processes.main:
            say("of each video its middle frame is kept; --format mp4 keeps all")
        self.batch = 1 if draws_videos(pipe) else 8
        self._rate = float(fps or frame_rate(pipe)) if moves else None
        self._drawing = Drawing(
            pipe, suite, texts, drawer.guidance, drawer.trailing, own=drawer.arguments, videos=moves
        )
        self._steps, self._label = drawer.steps, drawer.label
        settings = {
            "weights_sha256": weights,
            "prompts_sha256": rows_sha256(prompts or ()),
            "first_seed": seed,
            "steps": drawer.steps,
            "guidance": self._drawing.guidance,
            "trailing": drawer.trailing,
            "arguments": dict(drawer.arguments),
            "format": kind,
            "fps": self._rate,
        }
        self.pictures = PictureFolder(folder, texts, range(seed, seed + count), settings, kind)
        if processes.main:
            self.pictures.claim()
            (folder / FAILED).unlink(missing_ok=True)

    def draw(self, batch: int, processes: Processes, *, shown: bool) -> int:
        """Draws what is missing of this process's part, every n-th picture."""
        count, place = len(self.pictures.seeds), self.pictures.folder
        own = [number for number in self.pictures.missing() if number % processes.count == processes.rank]
        label = f"{self._label}, {self._steps} step{'s' * (self._steps > 1)}"
        with (
            processes.sharing(place),
            bar(
                len(range(processes.rank, count, processes.count)),
                label,
                unit="image" if self._rate is None else "video",
                shown=shown,
            ) as moving,
            saver() as saving,
        ):
            moving.update(moving.total - len(own))
            done = 0
            for pixels in self._drawing.batches(self._steps, batch, own):
                processes.go_on(place)
                saving.settle()
                for i, drawn in enumerate(pixels.movedim(-3, -1).numpy()):
                    file = self.pictures.file(own[done + i])
                    if self._rate is None:
                        saving.put(file, drawn)
                    else:
                        sounds = self._drawing.sounds
                        saving.put_video(file, drawn, self._rate, sounds[i] if sounds else None)
                done += len(pixels)
                moving.update(len(pixels))
        return len(own)
