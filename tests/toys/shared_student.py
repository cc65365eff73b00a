"""A student of a tiny teacher in the folder of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import shaken, tiny_prompts

from stepdistill.export.card import model_card
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.shared import Terms
from stepdistill.export.student_folder import export, pipeline_call
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher


def student_run(teacher: PipelineTeacher, times: tuple[float, ...], folder: Path, name: str = "sd") -> Path:
    """A run folder whose student, of the tiny teacher of this name, calls its network at these times."""
    roles = Copies(teacher)
    shaken(torch.nn.ParameterList(roles.parameters("student")), amount=0.2)
    sampler = on_stock_grid(
        Sampler(times, True), teacher.path, teacher.pipe.scheduler, passes=teacher.family.passes
    )
    prompts = tiny_prompts(name, 2)
    card = model_card(
        teacher="someone/tiny-sd",
        method="dmd",
        summary="Matches.",
        steps=len(times),
        guidance=2.5,
        call=pipeline_call(type(teacher.pipe).__name__, sampler, teacher.codec, prompts),
        grid="one",
        command="stepdistill train dmd",
        terms=Terms({"license": "openrail++"}, None, ()),
    )
    export(roles.student, sampler, teacher, folder / "student", prompts, card, seeds=(0, 1))
    (folder / "recipe.yaml").write_text("teacher: someone/tiny-sd\nmethod: dmd\noptions: {guidance: 2.5}\n")
    return folder
