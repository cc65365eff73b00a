"""``stepdistill hybrid``, ``join`` and ``trace``: pipelines put together without training, and what each predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.cli.options import command_line
from stepdistill.errors import UserError


def hybrid(
    teacher: Annotated[str, typer.Argument(help="Embedded teacher, diffusers folder or Hub name.")],
    student: Annotated[Path, typer.Argument(help="Its student: a run folder, or the student's own.")],
    output: Annotated[Path, typer.Option(help="Folder for the pipeline.")],
    teacher_calls: Annotated[
        int, typer.Option(min=0, help="How many of the student's calls the teacher takes.")
    ] = 1,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's scale; by default that of the student's recipe.")
    ] = None,
    teacher_grid: Annotated[
        int | None,
        typer.Option(
            min=1, help="The teacher's steps are of a grid of so many; by default at the student's times."
        ),
    ] = None,
) -> None:
    """Put the guided teacher's first steps before a student's others, as one pipeline that plain diffusers loads."""
    from stepdistill.export.verify import student_folder, verify
    from stepdistill.networks.find import check_teacher
    from stepdistill.networks.own_call import distilled_at

    check_teacher(teacher)
    folder = student_folder(student)
    scale = distilled_at(folder) if guidance is None else guidance
    if scale is None:
        raise UserError(
            f"--guidance: {student} lies in no run, so its teacher's scale is not known: give it, 1 for none"
        )
    _check_output(output)
    import torch

    from stepdistill.export.hybrid import write_hybrid
    from stepdistill.networks.loading import load_teacher
    from stepdistill.networks.teacher import PipelineTeacher
    from stepdistill.system.log import say

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = PipelineTeacher(load_teacher(teacher), device)
    made = write_hybrid(
        loaded, teacher, folder, output, guidance=scale, calls=teacher_calls, grid=teacher_grid,
        command=command_line(),
    )  # fmt: skip
    own = len(made.times) - made.teacher_calls
    passes = made.teacher_calls * (1 if scale == 1 else 2) + own
    say(
        f"{made.teacher_calls} call{'s' * (made.teacher_calls != 1)} of {teacher} at guidance {scale:g}, then {own} of "
        f"the student: {passes} network passes a picture"
    )
    print(verify(output))
    print(output)


def join(
    students: Annotated[list[Path], typer.Argument(help="Run folders of students of all parts, data.part.")],
    output: Annotated[Path, typer.Option(help="Folder for the pipeline.")],
) -> None:
    """Put the students of the parts of a partition together, as one pipeline that routes each prompt to its student."""
    _check_output(output)
    from stepdistill.export.joined import write_joined
    from stepdistill.export.verify import verify
    from stepdistill.training.joining import members_of

    members, prompts, parts = members_of(students)
    write_joined(members, prompts, parts, output, command_line())
    print(verify(output))
    print(output)


def _check_output(output: Path) -> None:
    """A new folder, an empty one, or one that was written before."""
    if output.is_file() or (
        output.is_dir() and any(output.iterdir()) and not (output / "verification").is_dir()
    ):
        raise UserError(f"--output {output} is there and no student's folder: give another")


def trace(
    pipelines: Annotated[
        list[str],
        typer.Argument(help="Embedded teachers, diffusers folders or run folders (their students)."),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What is drawn; may repeat.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Pictures of each prompt, for the diversity.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Of pipelines that are no students.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of pipelines that are no students. [default: a pipeline's own]")
    ] = None,
    features: Annotated[str, typer.Option(help="Network in which diversity is measured.")] = "emoji",
    output: Annotated[Path, typer.Option(help="Folder for trace.html, trace.png and trace.json.")] = Path(
        "trace"
    ),
) -> None:
    """Show what pipelines predict at each of their steps from the same noise, and where variety is lost."""
    if not prompt:
        raise UserError('trace: there is no prompt; give one or more, such as --prompt "red apple"')
    from stepdistill.networks.find import find_pipeline
    from stepdistill.system.files import check_writable

    for name in pipelines:
        find_pipeline(name)
    check_writable(output)
    from stepdistill.evaluation.trace import asked
    from stepdistill.evaluation.trace import trace as draw

    for each in draw(asked(pipelines, steps, guidance), prompt, seeds, output, features):
        print(
            f"{each.name}: diversity of x0 over {seeds} seeds "
            f"{', '.join(f'{value:.3f}' for value in each.diversity)} at t = "
            f"{', '.join(f'{time:.2f}' for time in each.times)}"
        )
    print(f"page: {output / 'trace.html'}")
