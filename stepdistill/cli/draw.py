"""``stepdistill sample`` and ``geneval``: pictures from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdistill.cli.options import Guidance, MeasuredGuidance, Pipeline
from stepdistill.errors import UserError
from stepdistill.system.seeds import LARGEST_SEED

if TYPE_CHECKING:
    from stepdistill.evaluation.sample import Drawn

Steps = Annotated[
    int | None, typer.Option(help="Network calls per picture. [default: a student's own; 25 of a teacher]")
]

PROMPT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".tar")


def sample(
    student: Pipeline,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts, one a picture; or class numbers."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="The same as PROMPT; may repeat.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Their file: .txt, .jsonl, .json, .csv, .tsv or .tar; needs --into.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture to draw from, of all PROMPTs; or may repeat, one for each."),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Picture i is drawn from seed + i.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture file to write; of videos, .mp4, .webp and .gif move. [default: grid.png]"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, help="Frames a second. [default: the pipeline's, or 16]")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Folder for a file per picture and an index; a begun one is finished."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", help="Of the files in it: png, or of videos mp4, webp or gif. [default: png]"
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Pictures to draw into it; by default one per prompt.")
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Into it, also the teacher's pictures from the same seeds.")
    ] = False,
    teacher_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the teacher. [default: 25]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures drawn at once into it. [default: 8; 1 of videos]")
    ] = None,
) -> None:
    """Draw pictures or videos from prompts: on one grid, or a picture of each into a folder."""
    given = [*(texts or ()), *(prompt or ())]
    for text in given:
        if text.endswith(PROMPT_FILES) and Path(text).is_file():
            raise UserError(f"{text} is a file, not a prompt: give --prompts {text} --into DIR")
    given = _from_pictures(given, image or [])
    if into is None:
        wanted = {"--prompts": prompts, "--count": count, "--teacher": teacher or None, "--format": kind,
                  "--teacher-steps": teacher_steps, "--batch": batch}  # fmt: skip
        for name, value in wanted.items():
            if value is not None:
                raise UserError(f"{name} is for files in a folder: add --into DIR")
        output = output or Path("grid.png")
        _check_output(output, fps)
        from stepdistill.evaluation.sample import sample as draw

        _save(draw(student, given, steps=steps, guidance=guidance, seed=seed), output, fps)
        print(output)
        return
    if teacher_steps is not None and not teacher:
        raise UserError("--teacher-steps is the teacher's: add --teacher, or leave it out")
    if output is not None:
        raise UserError(f"--output {output} is one file, --into {into} a folder of files: give one of them")
    from stepdistill.system.processes import launched

    processes = launched()
    from stepdistill.data.prompts import read_prompts
    from stepdistill.evaluation.draw_into import PICTURE, as_named, draw_into, teacher_of
    from stepdistill.networks.own_call import TEACHER_STEPS

    if prompts is not None:
        given += read_prompts(prompts, "--prompts")
    if not given and count is None:
        raise UserError("give prompts, --prompts FILE, or, of a pipeline that takes none, --count")
    drawers = [as_named(student, steps, guidance)]
    if teacher and drawers[0].label == "teacher":
        raise UserError(f"--teacher: {student} is no student, and draws for itself: leave --teacher out")
    drawers += [teacher_of(student, teacher_steps or TEACHER_STEPS)] if teacher else []
    if processes.main:
        from stepdistill.system.files import check_folder

        check_folder(into)
    draw_into(
        into, drawers, given or None, count or len(given), seed=seed, batch=batch, kind=kind or PICTURE,
        fps=fps,
        processes=processes,
    )  # fmt: skip
    processes.part()
    if processes.main:
        for drawer in drawers:
            print(into / drawer.label)


def _from_pictures(prompts: list[str], pictures: list[Path]) -> list[str]:
    """The prompts with the pictures that they are drawn from."""
    if not pictures:
        return prompts
    if len(pictures) not in (1, len(prompts)):
        raise UserError(
            f"--image is given {len(pictures)} times for {len(prompts)} prompts: give one, or one for each"
        )
    from stepdistill.pictures.given import with_picture

    every = pictures * len(prompts) if len(pictures) == 1 else pictures
    try:
        return [with_picture(text, file) for text, file in zip(prompts, every, strict=True)]
    except ValueError as error:
        raise UserError(f"--image: {error}") from None


def _check_output(output: Path, fps: float | None) -> None:
    from stepdistill.pages.videos import ANIMATED, FILM, check_kind
    from stepdistill.system.files import check_file

    check_file(output)
    check_kind(output.suffix)
    if fps is not None and output.suffix.lower() not in (FILM, *ANIMATED):
        raise UserError(f"--fps is of videos, and --output {output} is none: give .mp4, .webp or .gif")


def _save(drawn: Drawn, output: Path, fps: float | None) -> None:
    """Writes videos as such where the file's ending can hold them, else a picture of each, of a video its middle."""
    from stepdistill.pages.sheets import grid
    from stepdistill.pages.videos import ANIMATED, FILM, save_video

    kind = output.suffix.lower()
    if kind == FILM or (kind in ANIMATED and len(drawn.frames[0]) > 1):
        alone = drawn.sounds[0] if drawn.sounds and len(drawn.frames) == 1 else None
        save_video(output, drawn.frames, fps or drawn.rate, alone)
    else:
        grid(drawn.pictures).save(output)


def geneval(
    pipeline: Pipeline,
    prompts: Annotated[
        Path, typer.Option(help="GenEval's evaluation_metadata.jsonl; also GenEval 2's file.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write to; a begun one is finished.")],
    steps: Steps = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures of each prompt.")] = 4,
    guidance: MeasuredGuidance = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Picture j of prompt i: seed + samples * i + j.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    trailing: Annotated[
        bool, typer.Option("--trailing", help="Space the teacher's steps from its end.")
    ] = False,
) -> None:
    """Draw GenEval's prompts into its folder format, which its own environment then scores."""
    from stepdistill.evaluation.geneval import check_export, export_geneval, read_metadata
    from stepdistill.networks.find import find_pipeline

    find_pipeline(pipeline)
    read_metadata(prompts)
    check_export(output)
    drawn = export_geneval(
        pipeline, prompts, output, steps=steps, samples=samples, guidance=guidance, seed=seed, batch=batch,
        trailing=trailing,
    )  # fmt: skip
    print(f"{output}: {drawn} pictures drawn")
