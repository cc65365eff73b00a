"""``stepdistill compare``: several runs or evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.cli.options import command_line
from stepdistill.errors import UserError


def compare(
    reports: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders, folders or files of `eval --output`; or none, and --methods."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Train first: all, or methods, shipped recipes and recipe files, separated by commas."
        ),
    ] = None,
    teacher: Annotated[str, typer.Option(help="Teacher of the runs that are trained.")] = "emoji",
    budget: Annotated[
        str | None,
        typer.Option(help="Training time of each run, such as 90s, 10m or 1h; by default no limit."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of every recipe; may repeat."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compare.html, compare.json and the runs; trained: runs/compare_TEACHER."
        ),
    ] = None,
) -> None:
    """Put runs and evaluations side by side, ranked, or one run for each of several methods, trained first.

    The same command goes on where it was stopped: finished runs are kept, unfinished ones resumed, failed ones tried
    again.
    """
    if bool(reports) == bool(methods):
        raise UserError("compare: give either run folders, or --methods (all, or names separated by commas)")
    if reports and (budget or sets or teacher != "emoji"):
        raise UserError("compare: --budget, --set and --teacher are of runs that are trained: add --methods")
    folder = output
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    from stepdistill.comparison import train_all
    from stepdistill.system.files import check_writable

    if methods:
        wanted = train_all.plan(methods, teacher, train_all.seconds_of(budget) if budget else 0.0, sets or ())
        folder = output or Path("runs") / f"compare_{Path(teacher).name}"
        check_writable(folder)
        compared = train_all.compare_methods(wanted, folder, command_line())
    else:
        compared = train_all.collect(reports or [], command_line())
    from stepdistill.comparison.ranking import rank, text_table

    print(text_table(rank(compared.reports)))
    for name, error in compared.failed.items():
        print(f"{name}: failed: {error}")
    if compared.without_recipe:
        print(f"no recipe for: {', '.join(compared.without_recipe)}")
    if folder is not None:
        print(train_all.write_all(compared, folder))
    if compared.failed and not compared.reports:
        raise typer.Exit(1)
