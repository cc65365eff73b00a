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
        typer.Option(
            help="Training time of each run, such as 90s, 10m or 1.5h; by default no limit. Drawing pairs before it, "
            "and exporting and measuring after it, do not count."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Training seeds, such as 0,1,2: each method is trained with each, and means are compared."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="With --methods: say what each run takes and what they share, and stop."
        ),
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of every recipe; may repeat."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compare.html, compare.json and the runs; by default runs/compared, or "
            "runs/compare_TEACHER of runs that are trained."
        ),
    ] = None,
) -> None:
    """Put runs and evaluations side by side, or train one run for each of several methods first.

    What was measured in one way is ranked; what was not stands beside it, with the reason. The same command goes on
    where it was stopped: finished runs are kept, unfinished ones resumed, failed ones tried again.
    """
    if bool(reports) == bool(methods):
        raise UserError("compare: give either run folders, or --methods (all, or names separated by commas)")
    if reports and (budget or sets or seeds or dry_run or teacher != "emoji"):
        raise UserError(
            "compare: --budget, --seeds, --set, --dry-run and --teacher are of runs that are trained: add --methods"
        )
    folder = output
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    from stepdistill.comparison import collect, plan, train_all
    from stepdistill.comparison.table import text_tables
    from stepdistill.system.files import check_writable
    from stepdistill.system.log import say
    from stepdistill.system.parsing import printable

    if methods:
        seconds = plan.seconds_of(budget) if budget else 0.0
        wanted = plan.plan(methods, teacher, seconds, sets or (), plan.seeds_of(seeds) if seeds else ())
        folder = output or Path("runs") / f"compare_{Path(teacher).name}"
        for remark in wanted.remarks:
            say(remark)
        if dry_run:
            from stepdistill.cli.compare_plan import show

            show(wanted, folder)
            return
        check_writable(folder)
        compared = train_all.compare_methods(wanted, folder, command_line())
    else:
        compared = collect.collect(reports or [], command_line())
    if compared.groups:
        print(text_tables(compared.groups))
    for name, error in compared.failed.items():
        print(printable(f"{name}: {'failed' if methods else 'left out'}: {error}"))
    for line in compared.shared:
        print(line)
    if compared.without_recipe:
        print(f"no recipe for: {', '.join(compared.without_recipe)}")
    page = collect.write_all(compared, folder or Path("runs") / "compared")
    print(f"page: {page}")
    if compared.failed and not compared.reports:
        raise typer.Exit(1)
