"""``stepdistill push`` and ``demo``: a student goes to the Hub, and to a local page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepdistill.errors import UserError

Run = Annotated[Path, typer.Argument(help="Run folder, or the folder of its student.")]


def push(
    run: Run,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")],
    what: Annotated[
        Literal["adapter", "merged"] | None,
        typer.Option(help="Of a LoRA student; by default all that was exported."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The teacher on the Hub, if it was a folder.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Such as openrail++; by default the teacher's.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder, and push nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Of --dry-run: the folder to write; by default RUN/hub.")
    ] = None,
) -> None:
    """Push a student and its model card to the Hugging Face Hub."""
    if output is not None and not dry_run:
        raise UserError("--output is for --dry-run; leave it out, or add --dry-run")
    from stepdistill.sharing.hub import exported, listing, prepare, write
    from stepdistill.sharing.upload import check_repo, check_token, upload

    check_repo(repo)
    if base_model is not None:
        check_repo(base_model, "--base-model")
    if not dry_run:
        check_token()
    home = run if (run / "student").is_dir() else run.parent
    with exported(run, what) as folder:
        planned = prepare(folder, repo, base_model=base_model, licence=licence)
        for warning in planned.warnings:
            typer.echo(f"stepdistill: {warning}", err=True)
        print(listing(planned))
        if dry_run:
            whom = ", to a private repository" if private else ""
            print(f"not pushed{whom}: {write(planned, output or home / 'hub')}")
        else:
            print(upload(planned, private=private))


def demo(
    students: Annotated[list[str], typer.Argument(help="Run folders, or folders of students.")],
    teacher: Annotated[str | None, typer.Option(help="Drawn beside them, and voted on.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's scale; by default the first student's recipe's.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="That the page opens with.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the loopback interface.")] = 7860,
    votes: Annotated[Path, typer.Option(help="File of JSON lines; votes are added to it.")] = Path(
        "votes.jsonl"
    ),
    device: Annotated[
        str | None, typer.Option(help="Such as cpu; by default a GPU where there is one.")
    ] = None,
) -> None:
    """Draw from several students and the teacher on a local page, and vote blindly."""
    from stepdistill.networks.find import check_teacher
    from stepdistill.networks.own_call import distilled_at
    from stepdistill.sharing.drawers import (
        first_prompt,
        short_names,
        student_drawer,
        teacher_drawer,
    )
    from stepdistill.sharing.votes import read_votes
    from stepdistill.system.files import check_file
    from stepdistill.system.packages import check_installed

    check_installed("demo", "gradio")
    named = short_names(students)
    if teacher is not None:
        check_teacher(teacher)
    elif guidance is not None:
        raise UserError("--guidance is the teacher's: add --teacher, or leave it out")
    check_file(votes)
    read_votes(votes)
    from stepdistill.sharing.demo_page import HOST, Demo, build, check_port, serve

    check_port(port)
    drawers = [student_drawer(folder, name, device) for name, folder in named.items()]
    first = next(iter(named.values()))
    if teacher is not None:
        drawers.append(teacher_drawer(teacher, distilled_at(first) if guidance is None else guidance, device))
    page = build(Demo(drawers, votes), first_prompt(first) if prompt is None else prompt)
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)")
    serve(page, port)
