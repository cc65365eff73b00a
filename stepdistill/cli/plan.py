"""``stepdistill plan``: what a recipe will need, before anything is rented or downloaded."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from stepdistill.errors import UserError


def plan(
    recipe: Annotated[str | None, typer.Argument(help="Shipped recipe, or a .yaml file.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A pipeline folder (its weights are not read), a Hub name, or a shipped config: sdxl."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method's name, or ./file.py.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of the recipe; may repeat."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many share a batch.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Of one of them: 24GB; without it none is compared.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="For whose speed hours are said: h100.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe needs in memory, disk and hours, from configs alone, and what would make it fit."""
    from stepdistill.recipes.recipe import load_recipe

    size = bytes_of(memory) if memory else 0
    wanted = load_recipe(recipe, teacher=teacher, method=method, sets=sets or ())
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device is {device}: give cuda or cpu")
    from stepdistill.planning.plan import GPUS
    from stepdistill.planning.plan import plan as planned
    from stepdistill.planning.table import table

    if gpu is not None and gpu not in GPUS:
        raise UserError(f"--gpu is {gpu}, whose speed is not known here: give one of {', '.join(GPUS)}")
    found = planned(wanted, device="cpu" if device == "cpu" else "cuda", gpus=gpus, memory=size, gpu=gpu)
    print(json.dumps(found.as_json(), indent=1) if as_json else table(found))


def bytes_of(text: str) -> int:
    """Bytes that a text says: 24GB and 24GiB are both what a card of that name has, 24 x 2^30."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([gGmM])i?[bB]?", text.strip())
    if found is None:
        raise UserError(f"--memory is {text}: give it as 24GB")
    return int(float(found[1]) * (2**30 if found[2] in "gG" else 2**20))
