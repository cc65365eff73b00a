"""``stepdistill train``, ``export`` and ``verify``: a run and its student."""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepdistill.cli.options import command_line, sides_of
from stepdistill.errors import UserError
from stepdistill.system.packages import check_installed
from stepdistill.system.processes import told
from stepdistill.system.run_folder import RunFolder

if TYPE_CHECKING:
    from stepdistill.training.run_report import RunReport


class NetworkFormat(Enum):
    """What a one-step network is written for; an Enum, as an option that repeats takes no Literal."""

    torch = "torch"
    onnx = "onnx"


def train(
    recipe: Annotated[str | None, typer.Argument(help="Shipped recipe, or a .yaml file.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Embedded teacher, diffusers folder or Hub name.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method's name, or ./file.py.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/METHOD_TEACHER, numbered.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Network calls in which the student draws: student.steps.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of a LoRA: student.lora_rank.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts: data.prompts.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's, which the student takes over: options.guidance.")
    ] = None,
    updates: Annotated[int | None, typer.Option(help="Length of the training: train.updates.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height and width in pixels: data.size.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of the recipe; may repeat."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would run, its memory, disk and time, and write nothing."),
    ] = False,
) -> None:
    """Train a student, export it, prove the export and measure it."""
    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training.distil import run_recipe
    from stepdistill.training.interruption import REQUEUE, Preempted

    source: str | Path | None = recipe
    if resume and recipe is None and output is not None and (output / "recipe.yaml").is_file():
        source = output / "recipe.yaml"  # the run's own recipe, so that --resume --output RUN is enough
    short = _short_flags(steps, lora, prompts, guidance, updates, size)
    wanted = load_recipe(
        source,
        teacher=teacher,
        method=method,
        sets=[*(f"{key}={value}" for key, (_, value) in short.items()), *(sets or ())],
        flags={key: flag for key, (flag, _) in short.items()},
    )
    if dry:
        from stepdistill.cli.dry_run import dry_run

        dry_run(wanted)
        return
    given = output or (Path(wanted.output) if wanted.output else None)
    folder = given or _default_run_folder(wanted.method, wanted.teacher, resume)
    try:
        run = run_recipe(wanted, output=folder, resume=resume, command=command_line())
    except Preempted:
        raise typer.Exit(REQUEUE) from None
    if run.report is not None:
        _tell_end(run.report, RunFolder(run.folder))


def _short_flags(
    steps: int | None,
    lora: int | None,
    prompts: str | None,
    guidance: float | None,
    updates: int | None,
    size: str | None,
) -> dict[str, tuple[str, str]]:
    """Key -> the option that sets it, and its value in YAML."""
    values: dict[str, tuple[str, object]] = {
        "student.steps": ("--steps", steps),
        "student.lora_rank": ("--lora", lora),
        "data.prompts": ("--prompts", prompts),
        "options.guidance": ("--guidance", guidance),
        "train.updates": ("--updates", updates),
        "data.size": ("--size", sides_of(size) if size is not None else None),
    }
    return {key: (flag, json.dumps(value)) for key, (flag, value) in values.items() if value is not None}


def _tell_end(report: RunReport, place: RunFolder) -> None:
    """The last lines of a run: its scores, its health, and what to look at and to do next."""
    from stepdistill.comparison.ranking import rank
    from stepdistill.comparison.table import text_table
    from stepdistill.networks.own_call import own_call

    sys.stderr.flush()
    if report.student.get("fd"):
        print(text_table(rank([report])))
    if report.health is not None:
        print(report.health.line())
    print(f"student: {place.student}")
    print(f"page: {place.page}")
    prompt = ' --prompt "..."' if report.prompts is not None else ""
    own = own_call(place.student)
    prompt += " --image FILE" if own is not None and own.from_picture else ""
    print(f"next: stepdistill sample {shlex.quote(str(place.root))}{prompt}")


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or interrupted.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the student; by default RUN/student.")
    ] = None,
    what: Annotated[
        Literal["adapter", "merged", "both"] | None,
        typer.Option(help="Of a LoRA student; by default the recipe's."),
    ] = None,
    kohya: Annotated[
        bool, typer.Option("--kohya", help="Write the adapter under the names of kohya's scripts, too.")
    ] = False,
    comfyui: Annotated[
        bool, typer.Option("--comfyui", help="Write a workflow for ComfyUI beside it.")
    ] = False,
    formats: Annotated[
        list[NetworkFormat] | None,
        typer.Option(
            "--format", help="Write a one-step student's network so, and export nothing else; may repeat."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of its network's files, such as 5GB; by default the teacher's.")
    ] = None,
    add_lora: Annotated[
        str | None,
        typer.Option(help="A LoRA for its teacher, put into the weights of the student that is there."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Of that LoRA.")] = 1.0,
) -> None:
    """Export the student of a run's last checkpoint again, or its one-step network in another format."""
    given = {
        "what": what,
        "kohya": "true" if kohya else None,
        "comfyui": "true" if comfyui else None,
        "max_shard_size": max_shard_size,
    }
    if add_lora is not None:
        if other := next((name for name, value in given.items() if value), "format" if formats else None):
            raise UserError(
                f"--add-lora takes the student that is there, without --{other}: run export twice"
            )
        if output is None or output.resolve() in (run.resolve(), (run / "student").resolve()):
            raise UserError("--add-lora writes another student: give --output DIR")
        from stepdistill.export.with_lora import lora_file, write_with_lora

        lora_file(add_lora)
        write_with_lora(run, add_lora, scale, output)
        from stepdistill.export.verify import verify as prove

        print(prove(output))
        print(output)
        return
    if scale != 1.0:
        raise UserError("--scale is of --add-lora: add that, or leave it out")
    if formats:
        if named := [name for name, value in given.items() if value]:
            raise UserError(
                f"--format writes the student that is there, without --{named[0]}: run export twice"
            )
        if NetworkFormat.onnx in formats:
            check_installed("onnx", "onnx", "onnxscript", "onnxruntime")
        from stepdistill.sharing.one_network import write_network

        print(write_network(run, [each.value for each in formats], output))
        return
    from stepdistill.training.distil import export_run

    sets = [f"export.{name}={value}" for name, value in given.items() if value]
    print(export_run(run, output, sets))


def verify(
    student: Annotated[Path, typer.Argument(help="Student folder.")],
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Hours that it may take. [default: 6]")
    ] = None,
) -> None:
    """Prove that plain diffusers loads a student and draws what its trainer drew."""
    if not student.is_dir():
        raise UserError(f"{student} is not a folder; give a student's folder, such as runs/NAME/student")
    from stepdistill.export.verify import verify as prove

    print(prove(student, hours))


def _default_run_folder(method: str, teacher: str, resume: bool) -> Path:
    from stepdistill.training import preflight

    if told().count > 1:
        # Each process would number the folder by what it finds, and the first one has made its own by then.
        raise UserError("give --output DIR when several processes train together")
    name = f"{Path(method).stem}_{Path(teacher).name}"
    return (preflight.newest_run_folder if resume else preflight.next_run_folder)(Path("runs"), name)
