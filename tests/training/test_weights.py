"""How trained weights are held: stochastic rounding, masters, bytes of each, and where none of it is to be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from run_toy import HERE
from short_run import LOW, run
from tiny import tiny_prompts, tiny_teacher
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.methods.dmd import DMD
from stepdistill.methods.meanflow import MeanFlow
from stepdistill.networks.derivative import Derivative
from stepdistill.networks.roles import Adapters
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.training.weights import Weights, check_weights, rounded


def test_stochastic_rounding_takes_a_neighbour_and_is_the_value_on_average() -> None:
    count = 40_000
    values = torch.tensor([1.0, 1.001, -1.001, 1.0077, -3e-5, 0.0, 7.3e20, 1e-39])
    wide = values[:, None].expand(-1, count).contiguous()
    drawn = rounded(wide, Draws(0, 0, 0, wide.numel()), "rounding").float()
    nearest = values.bfloat16().float()
    for i, value in enumerate(values):
        seen = drawn[i].unique()
        # bfloat16's own two numbers around the value, or it alone where it is one
        bits = int(value.view(torch.int32)) & -(1 << 16)
        around = torch.tensor([bits, bits + (1 << 16)], dtype=torch.int32).view(torch.float32)
        if float(value) == float(nearest[i]):
            assert seen.tolist() == [float(value)]
            continue
        assert sorted(seen.tolist()) == sorted(around.tolist())
        scale = float((around[1] - around[0]).abs())
        up = float((value - around[0]) / (around[1] - around[0]))
        error = float(drawn[i].double().mean() - value.double()) / scale
        assert abs(error) < 4 * (up * (1 - up) / count) ** 0.5
    assert not torch.equal(drawn, rounded(wide, Draws(0, 1, 0, wide.numel()), "rounding").float())
    assert torch.equal(drawn, rounded(wide, Draws(0, 0, 0, wide.numel()), "rounding").float())


BNB = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="adamw8bit needs bitsandbytes"
)


def options(weights: str, **more: object) -> TrainOptions:
    return TrainOptions.model_validate({"weights": weights, "precision": "bf16", "lr": 1e-4, **more})


def updated(weights: str, updates: int) -> Tensor:
    """Weights of 1 that AdamW moves down by 1e-4 at each update: float32 at the end."""
    weight = nn.Parameter(torch.ones(128, 64))
    low = [] if weights == "float32" else [weight]
    held = Weights("student", options(weights, weight_decay=0.0), [weight], low)
    for step in range(updates):
        weight.grad = torch.ones_like(weight)
        held.step(step)
        assert weight.grad is None and weight.dtype == (torch.bfloat16 if low else torch.float32)
    held.widen()
    return weight.detach()


def test_small_updates_move_a_rounded_weight_as_they_do_a_float32_one() -> None:
    """An update of 1e-4 is a 40th of what bfloat16 tells apart below 1: rounded to nearest, none would be left."""
    assert torch.equal((torch.ones(1) - 1e-4).bfloat16(), torch.ones(1).bfloat16())
    exact, count = updated("float32", 100), 128 * 64
    torch.testing.assert_close(exact.mean(), torch.tensor(0.99), atol=1e-5, rtol=0)
    assert torch.equal(updated("master", 100), exact)
    low = updated("bf16", 100)
    # A sum of 100 roundings to multiples of 2^-8, each of at most that squared over 4.
    assert abs(float(low.mean() - exact.mean())) < 4 * (100 / 4) ** 0.5 * 2**-8 / count**0.5
    assert float(low.std()) > 0


def test_masters_give_the_very_run_of_float32_weights_under_autocast(tmp_path: Path) -> None:
    """Each matrix is used once a backward pass, so that no sum is taken in bfloat16."""
    wide, job = run(tmp_path / "wide", LOW, "train.clip=0")
    master, other = run(tmp_path / "master", "train.weights=master", LOW, "train.clip=0")
    for key, value in wide.items():
        if key.startswith("roles."):
            assert torch.equal(master[key].float(), value.to(master[key].dtype).float()), key
        else:
            assert torch.equal(master[key], value), key
    assert {value.dtype for key, value in master.items() if key.startswith("roles.")} == {
        torch.float32,
        torch.bfloat16,
    }
    own = dict(other.student.net.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in job.student.net.named_parameters())


@pytest.mark.parametrize(
    ("weights", "optimizer", "size"),
    [
        ("float32", "adamw", 4 + 4 + 8),
        ("master", "adamw", 2 + 2 + 4 + 8),
        ("bf16", "adamw", 2 + 2 + 8),
        pytest.param("bf16", "adamw8bit", 2 + 2 + 2, marks=BNB),
        ("bf16", "adafactor", 2 + 2),
    ],
)
def test_bytes_of_a_weight(weights: str, optimizer: str, size: int) -> None:
    """Of all memory that lives between a backward pass and its update."""
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    parameters = list(net.parameters())
    low = [] if weights == "float32" else parameters
    held = Weights("student", options(weights, optimizer=optimizer), parameters, low)

    def backward(step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            net(torch.ones(2, 512)).square().mean().backward()
        del step

    backward(0)
    held.step(0)
    backward(1)
    stood_in = [each for group in held.optimizer.param_groups for each in group["params"]]
    moments = [v for state in held.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *stood_in, *moments]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    count = sum(p.numel() for p in parameters)
    assert sum(storages.values()) / count == pytest.approx(size, abs=0.05)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.weights=bf16"], "weights is bf16 and precision is float32"),
        (
            ["train.weights=master", LOW, "train.parallel=sharded"],
            "parallel is sharded, whose parts are float32",
        ),
        (["train.weights=bf16", LOW, "student.lora_rank=4"], "a LoRA trains small float32 adapters"),
    ],
)
def test_what_does_not_go_together_is_one_line(sets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)


def slopes_of_adapters(held: torch.dtype, around: bool = True) -> tuple[MeanFlow, Tensor]:
    """MeanFlow with adapters on a base held so, and how its velocity changes in a direction, with autocast around."""
    teacher = tiny_teacher("sd3")
    teacher.compute_in(held)
    method = MeanFlow(Adapters(teacher, 2), (1.0,), MeanFlow.Options())
    cond, generator = teacher.codec.encode(tiny_prompts("sd3", 4)), torch.Generator().manual_seed(0)
    x, t = torch.randn(4, *teacher.codec.shape, generator=generator), torch.tensor([0.9, 0.7, 0.5, 0.3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=around):
        velocity = lambda x, t: method.student.predict(x, t, cond).velocity  # noqa: E731
        moves = (torch.randn(x.shape, generator=generator), torch.ones(4))
        return method, Derivative("difference", 5e-3)(velocity, (x, t), moves)


def test_derivatives_of_adapters_are_taken_on_a_base_in_float32_and_refused_on_another() -> None:
    """A base in bfloat16 computes every call in it: rounding over a short step is 20 times what it is in float32."""
    (wide, exact), (low, rough) = (slopes_of_adapters(dtype) for dtype in (torch.float32, torch.bfloat16))
    plain = slopes_of_adapters(torch.float32, around=False)[1]
    assert torch.equal(exact, plain)
    assert float((rough - exact).norm() / exact.norm()) > 0.02
    check_weights(options("float32", teacher_precision="float32"), "auto", wide)
    for base in ("auto", "bf16"):
        with pytest.raises(
            UserError, match=r"set train\.teacher_precision=float32 and student.base=auto"
        ) as told:
            check_weights(options("float32"), base, low)
        assert "\n" not in str(told.value)
    check_weights(options("float32"), "auto", DMD(low.roles, (1.0,), DMD.Options()))
