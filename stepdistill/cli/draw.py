"""``stepdistill sample`` and ``geneval``: pictures from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.cli.options import Guidance, Pipeline


def sample(
    student: Pipeline,
    prompt: Annotated[list[str], typer.Option(help="Text of one picture; may repeat.")],
    steps: Annotated[int, typer.Option(help="Network evaluations per picture.")] = 1,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Picture i is drawn from seed + i.")] = 0,
    output: Annotated[Path, typer.Option(help="Picture file to write.")] = Path("grid.png"),
) -> None:
    """Draw pictures from prompts, on one grid."""
    from stepdistill.system.files import check_file

    check_file(output)
    from stepdistill.evaluation.sample import sample as draw
    from stepdistill.pages.sheets import grid

    grid(draw(student, prompt, steps=steps, guidance=guidance, seed=seed)).save(output)
    print(output)


def geneval(
    pipeline: Pipeline,
    prompts: Annotated[
        Path, typer.Option(help="GenEval's evaluation_metadata.jsonl; also GenEval 2's file.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write to; a begun one is finished.")],
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per picture.")] = 4,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures of each prompt.")] = 4,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture j of prompt i: seed + samples * i + j.")] = 0,
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
