"""The command line: verbs, each importing what it needs when it runs, torch after everything cheap was checked.

A verb is a function of the file of its kind; its line in the table below makes it one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from stepdistill.cli import (
    compare,
    compose,
    doctor,
    draw,
    evaluate,
    listing,
    partition,
    plan,
    share,
    train,
    watch,
)
from stepdistill.cli.usage import epilog, in_one_line
from stepdistill.errors import OtherProcessError, UserError
from stepdistill.system.files import disk_error

VERBS: dict[str, Callable[..., None]] = {
    "ls": listing.list_names,
    "cp": listing.copy_shipped,
    "plan": plan.plan,
    "train": train.train,
    "watch": watch.watch,
    "sample": draw.sample,
    "eval": evaluate.evaluate_pipeline,
    "geneval": draw.geneval,
    "stats": evaluate.stats,
    "compare": compare.compare,
    "hybrid": compose.hybrid,
    "partition": partition.partition,
    "join": compose.join,
    "trace": compose.trace,
    "export": train.export,
    "verify": train.verify,
    "push": share.push,
    "demo": share.demo,
    "doctor": doctor.doctor,
}

app = typer.Typer(
    name="stepdistill",
    help="Distil diffusion and flow pipelines into students that draw in one to eight steps.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for name, verb in VERBS.items():
    app.command(name, epilog=epilog(name), no_args_is_help=name == "train")(verb)

UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""Of typer's own click, or of the package where typer is older."""


def main() -> None:
    """Runs the command line: a UserError, a wrong option, and a disk that is full or cannot be written is one line on
    stderr and exit status 2; anything else keeps its traceback."""
    # Else the first import says at length which image processors of transformers lack torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        raise SystemExit(app(standalone_mode=False, prog_name="stepdistill") or 0)
    except UsageError as error:
        said = in_one_line(error)
        print(f"stepdistill: {said}" if said else cast(Any, error).format_message(), file=sys.stderr)
        raise SystemExit(2) from None
    except OtherProcessError:
        time.sleep(10)  # a launcher ends all processes when one ends, and that other one has yet to say why
        raise SystemExit(2) from None
    except UserError as error:
        print(f"stepdistill: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        said = disk_error(error)
        if said is None:
            raise
        print(f"stepdistill: {said}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from stepdistill import __version__

        print(__version__)
        raise typer.Exit
