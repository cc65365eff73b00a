"""What a model card says is what its folder does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from student_toy import SAMPLERS
from tiny import tiny_prompts

from stepdistill.export.card import model_card
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.networks.roles import Copies
from stepdistill.networks.teacher import PipelineTeacher


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("sd", "text-to-image"),
        ("wan", "text-to-video"),
        ("unet-classes", "unconditional-image-generation"),
    ],
)
def test_its_code_draws(
    name: str, tag: str, teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    teacher, folder = teacher_of(name), tmp_path / "student"
    family, prompts = teacher.family, tiny_prompts(name, 2)
    sampler = on_stock_grid(SAMPLERS[name], teacher.path, teacher.pipe.scheduler, passes=family.passes)
    export(Copies(teacher).student, sampler, teacher, folder, prompts, "# A card\n", seeds=(0, 1))
    card = model_card(
        teacher=name,
        method="dmd",
        summary="",
        steps=sampler.steps,
        guidance=1.0,
        call=json.loads((folder / "verification" / "manifest.json").read_text())["call"],
        grid="",
        command="",
        video=family.video,
    )
    assert f"pipeline_tag: {tag}\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    known: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(folder)), known)
    if family.video:
        assert len(known["video"]) == teacher.size.frames  # type: ignore[arg-type]
    else:
        assert known["image"].size == (teacher.size.width, teacher.size.height)  # type: ignore[attr-defined]
