"""A few updates of every further family's tiny teacher, after which its stock pipeline draws what its student does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from tiny import MORE, SIZES, VIDEO, tiny_pipeline

from stepdistill.export.student_folder import check_export
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", MORE)
def test_all_weights_or_adapters_are_trained_and_can_be_exported(
    name: str, rank: int, tmp_path: Path
) -> None:
    """Two updates of all weights, one of adapters; each of the student and of the network that follows it."""
    (tmp_path / "prompts.txt").write_text("a red heart\nblue fish\n")
    size = SIZES.get(name)
    sets = [
        *(f"student.lora_rank={rank}", "student.output=teacher", "student.times=[1.0]", "train.lr=1e-2"),
        *(f"train.updates={2 if rank else 4}", "train.batch=1", "train.preview_every=0", "train.average=0"),
        *("options.guidance=2", "options.fake_updates=1", "options.fake_warm_start=0", "evaluate=false"),
        *(
            f"data.prompts={tmp_path / 'prompts.txt'}",
            *(
                [f"data.size={[size.height, size.width, size.frames][: 3 if name in VIDEO else 2]}"]
                if size
                else []
            ),
        ),
    ]
    recipe = load_recipe(HERE / "empty.yaml", method="dmd", teacher=name, sets=sets)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, tiny_pipeline(name))
    weights = job.method.roles.parameters("student")
    before = [value.detach().clone() for value in weights]
    train(job.objective, training_data(job, tmp_path), recipe, tmp_path, accelerator)
    moved = [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)]
    assert sum(moved) > 0.4 * len(moved)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["network"] for row in rows] == ["fake score", "student"] * (1 if rank else 2)
    check_export(job.student, job.sampler, job.teacher, "a red heart")
