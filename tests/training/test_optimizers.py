"""Ways to hold weights and moments other than float32 and AdamW: what they hold, and that a resumed run is that of one
that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_toy import HERE
from short_run import LOW, run
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import load_recipe


def held_by(found: dict[str, Tensor], part: str) -> int:
    """Bytes of a part of a checkpoint."""
    return sum(
        value.numel() * value.element_size() for key, value in found.items() if key.startswith(f"{part}.")
    )


WAYS = {
    "adafactor": ["train.optimizer=adafactor"],
    "bf16": ["train.weights=bf16", LOW],
    "master": ["train.weights=master", LOW],
    "bf16 and adafactor": ["train.weights=bf16", "train.optimizer=adafactor", LOW],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_bit_for_bit(way: str, tmp_path: Path) -> None:
    """And what is exported is float32: the masters, or the rounded weights widened."""
    whole, job = run(tmp_path / "whole", *WAYS[way])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *WAYS[way], last=2)
    parts, _ = run(tmp_path / "parts", *WAYS[way], resume=True)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    student, count = dict(job.student.net.named_parameters()), held_by(whole, "ema") / 4
    assert {value.dtype for value in student.values()} == {torch.float32} and job.student.compute is None
    if "adafactor" in way:
        assert 0 < held_by(whole, "optimizer-student") < 0.25 * 4 * count
    low = [v for key, v in whole.items() if key.startswith("roles.student.") and v.dtype == torch.bfloat16]
    assert bool(low) == (way != "adafactor")
    if way == "master":
        masters = [value for key, value in whole.items() if key.startswith("masters-student.")]
        assert len(masters) == len(low)
        assert all(any(torch.equal(value, own) for own in student.values()) for value in masters)
    else:
        assert all(torch.equal(v, whole[f"roles.student.{key}"].float()) for key, v in student.items())


def test_adafactor_takes_no_parts_of_weights() -> None:
    sets = ["train.optimizer=adafactor", "train.parallel=sharded"]
    with pytest.raises(UserError, match="adafactor and parallel is sharded, whose parts it cannot take"):
        load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
