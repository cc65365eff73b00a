"""Ways to hold weights and moments other than float32 and AdamW: what they hold, and that a resumed run is that of one
that was not stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from run_toy import HERE
from short_run import LOW, run
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.training import optimizers
from stepdistill.training.checkpoint import optimizer_state
from stepdistill.training.optimizers import check_optimizer, optimizer_of


def held_by(found: dict[str, Tensor], part: str) -> int:
    """Bytes of a part of a checkpoint."""
    return sum(
        value.numel() * value.element_size() for key, value in found.items() if key.startswith(f"{part}.")
    )


BNB = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="adamw8bit needs bitsandbytes"
)
WAYS = {
    "adafactor": ["train.optimizer=adafactor"],
    "bf16": ["train.weights=bf16", LOW],
    "master": ["train.weights=master", LOW],
    "bf16 and adafactor": ["train.weights=bf16", "train.optimizer=adafactor", LOW],
    "adamw8bit": ["train.optimizer=adamw8bit"],
    "bf16 and adamw8bit": ["train.weights=bf16", "train.optimizer=adamw8bit", LOW],
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[BNB] * way.endswith("adamw8bit")) for way in WAYS])
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
    if "adamw8bit" in way:
        moments = [value for key, value in whole.items() if key.startswith("optimizer-student.")]
        assert any(value.dtype == torch.uint8 for value in moments)
    low = [v for key, v in whole.items() if key.startswith("roles.student.") and v.dtype == torch.bfloat16]
    assert bool(low) == (LOW in WAYS[way])
    if way == "master":
        masters = [value for key, value in whole.items() if key.startswith("masters-student.")]
        assert len(masters) == len(low)
        assert all(any(torch.equal(value, own) for own in student.values()) for value in masters)
    else:
        assert all(torch.equal(v, whole[f"roles.student.{key}"].float()) for key, v in student.items())


@BNB
def test_eight_bits_move_weights_nearly_as_adamw_does() -> None:
    """And hold two bytes a weight, where that has 4,096 or more."""
    found = []
    for name in ("adamw", "adamw8bit"):
        options = TrainOptions.model_validate({"optimizer": name, "lr": 1e-3, "weight_decay": 0.0})
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(128, 64, generator=generator))
        start, optimizer = weight.detach().clone(), optimizer_of(options, [weight])
        for _ in range(20):
            weight.grad = weight.detach() + 0.1 * torch.randn(128, 64, generator=generator)
            optimizer.step()
        found.append(weight.detach() - start)
        held = sum(value.nbytes for value in optimizer_state(optimizer).values())
    assert held < 2.1 * weight.numel() + 2 * 4 * 256 + 16
    exact, low = found
    assert float((exact - low).norm() / exact.norm()) < 0.05 and not torch.equal(exact, low)


def test_a_missing_library_or_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    check_optimizer("adafactor", torch.device("mps"))
    with pytest.raises(UserError, match="adamw8bit, which needs bitsandbytes, and that is not installed"):
        check_optimizer("adamw8bit", torch.device("cpu"))
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="runs on cpu and cuda, and this run is on mps"):
        check_optimizer("adamw8bit", torch.device("mps"))


def test_an_average_elsewhere_is_the_same_average() -> None:
    """On a machine of one device the place is its own: that a copy is kept, followed and put back."""
    weights = {"w": nn.Parameter(torch.tensor([1.0, 2.0]))}
    here, there = Ema(weights, 0.5), Ema(weights, 0.5, device=torch.device("cpu"))
    with torch.no_grad():
        weights["w"].mul_(3)
    here.update(), there.update()
    assert torch.equal(here.shadow["w"], there.shadow["w"]) and not torch.equal(
        there.shadow["w"], weights["w"]
    )
    meta = Ema(weights, 0.5, device=torch.device("meta"))
    meta.update()
    assert meta.shadow["w"].device.type == "meta"


@pytest.mark.parametrize("name", ["adafactor", "adamw8bit"])
def test_other_optimizers_take_no_parts_of_weights(name: str) -> None:
    sets = [f"train.optimizer={name}", "train.parallel=sharded"]
    with pytest.raises(UserError, match=f"{name} and parallel is sharded, whose parts it cannot take"):
        load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
    with pytest.raises(UserError, match="average_device is cpu and parallel is sharded"):
        load_recipe(
            HERE / "empty.yaml", method="dmd", sets=["train.average_device=cpu", "train.parallel=sharded"]
        )
