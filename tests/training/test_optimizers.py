"""Optimisers other than AdamW: what they hold, and that a resumed run is that of one that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from safetensors.torch import load_file
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble, training_data
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train


def test_adafactor_resumes_bit_for_bit_and_holds_little_of_a_transformer(tmp_path: Path) -> None:
    def run(folder: Path, last: int = 4, resume: bool = False) -> dict[str, torch.Tensor]:
        sets = [
            *("train.optimizer=adafactor", "student.output=teacher", "train.steps=4", "train.batch=2"),
            *("train.checkpoint_every=2", "train.sheet_every=1", "evaluate=false", "options.fake_steps=1"),
        ]
        recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=[*sets, "train.lr=1e-3"])
        folder.mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(recipe), accelerator, tiny_pipeline("dit"))

        def preview(step: int, ema: Ema | None) -> Seen:
            if step > last:
                raise KeyboardInterrupt
            return Seen({}, [])

        data = training_data(job, folder)
        train(job.objective, data, recipe, folder, accelerator, resume=resume, preview=preview)
        files = sorted(checkpoints_in(folder / "checkpoints")[-1].glob("*.safetensors"))
        found = {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}
        held = sum(value.numel() for key, value in found.items() if key.startswith("optimizer-student."))
        assert 0 < held < 0.25 * sum(value.numel() for value in job.method.student.net.parameters())
        return found

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", last=2)
    parts = run(tmp_path / "parts", resume=True)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_adafactor_takes_no_parts_of_weights() -> None:
    sets = ["train.optimizer=adafactor", "train.parallel=sharded"]
    with pytest.raises(UserError, match="adafactor and parallel is sharded, whose parts it cannot take"):
        load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
