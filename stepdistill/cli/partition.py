"""``stepdistill partition``: prompts of one kind together, a part for each of several students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.errors import UserError

SHOWN = 4
"""Prompts of a part that are printed: those nearest to its middle."""


def partition(
    output: Annotated[
        Path, typer.Option(help="File for the parts, a line for each prompt: data.partition of a recipe.")
    ],
    teacher: Annotated[
        str, typer.Option(help="Whose text encoders: embedded teacher, diffusers folder or Hub name.")
    ] = "emoji",
    prompts: Annotated[
        Path | None, typer.Option(help="data.prompts of the recipe; by default the embedded captions.")
    ] = None,
    parts: Annotated[int, typer.Option(min=2, help="How many.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the first centres.")] = 0,
) -> None:
    """Share prompts out among several students: equal parts, prompts of one kind together."""
    from stepdistill.data.prompts import open_prompts
    from stepdistill.networks.find import check_teacher
    from stepdistill.system.emoji import embedded_teachers, emoji_captions
    from stepdistill.system.files import check_file, written_whole

    check_teacher(teacher)
    if prompts is None and teacher not in embedded_teachers():
        raise UserError(f"partition: {teacher} draws from prompts: give --prompts FILE")
    texts = emoji_captions() if prompts is None else open_prompts(prompts)
    if len(texts) < parts:
        raise UserError(f"--parts is {parts}, and there are {len(texts)} prompts: give fewer")
    check_file(output)
    import torch

    from stepdistill.data.clusters import balanced_clusters, prompt_features
    from stepdistill.families.kinds import LabelFamily
    from stepdistill.networks.loading import load_teacher
    from stepdistill.networks.teacher import PipelineTeacher

    loaded = PipelineTeacher(load_teacher(teacher), "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(loaded.family, LabelFamily):
        raise UserError(
            f"partition: {teacher} draws classes, not prompts: set data.partition to consecutive or hash"
        )
    features = prompt_features(loaded, texts)
    found = balanced_clusters(features, parts, seed)
    with written_whole(output) as temporary:
        temporary.write_text("".join(f"{k + 1}\n" for k in found.tolist()), "utf-8")
    for k in range(parts):
        own = (found == k).nonzero()[:, 0]
        near = (features[own] - features[own].mean(0)).norm(dim=1).argsort()[:SHOWN]
        shown = "; ".join(texts[i] for i in own[near].tolist())
        print(f"part {k + 1}: {len(own):,} prompts, such as: {shown}")
    print(output)
