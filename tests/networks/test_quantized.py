"""Adapters on a network whose linear layers are held in eight bits or four; and what cannot be."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from run_toy import HERE
from short_run import LOW, run
from tiny import shaken, tiny_pipeline, tiny_prompts, tiny_teacher
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.networks import quantized as module
from stepdistill.networks.denoiser import matrices
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.quantized import LIBRARIES, check_quantized, plain_tensors, quantized
from stepdistill.networks.roles import Adapters
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.training.exporting import export_student
from stepdistill.training.roles import held_for_adapters, round_on_host
from stepdistill.training.run_report import Start

BITS: tuple[Any, ...] = tuple(
    pytest.param(
        bits, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")
    )
    for bits, library in LIBRARIES.items()
)


def widened(layer: nn.Module) -> Tensor:
    """The weights that a quantised layer multiplies by, from its product with the unit matrix."""
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    return (layer(torch.eye(layer.in_features)) - bias).T.detach()


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_layer_is_near_its_own_and_takes_a_share_of_its_bytes(bits: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).requires_grad_(False)
    low = quantized(net, bits, ["0"])
    assert low[1].weight is net[1].weight and type(net[0].weight) is nn.Parameter
    own, theirs = net[0].weight, widened(low[0])
    # Half a step of a row's 127, and half the widest gap between nf4's numbers.
    bound = own.abs().amax(1, keepdim=True) / 254 if bits == "int8" else own.abs().max() * 0.16
    assert bool(((own - theirs).abs() <= bound + 1e-3 * own.abs().max()).all()) and not torch.equal(
        own, theirs
    )
    state = module.plain_tensors(low.state_dict())
    size = sum(v.numel() * v.element_size() for key, v in state.items() if key.startswith("0.weight"))
    assert size / own.numel() < {"int8": 1.05, "nf4": 0.6}[bits]
    # The gradient of its input is that of the weights it multiplies by, also after a call without a graph.
    x = torch.randn(3, 256)
    with torch.no_grad():
        low(x)
    x.requires_grad_(True)
    low[0](x).square().sum().backward()
    wanted = torch.autograd.grad(nn.functional.linear(x, theirs, net[0].bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("bits", BITS)
def test_roles_on_a_quantised_base_are_those_on_its_widened_weights(bits: Any, name: str) -> None:
    """The teacher is the base with adapters off; losses and gradients are those of plain layers that hold what the
    quantised ones multiply by; an ordinary network of a role has the unrounded weights."""
    teacher = tiny_teacher(name)
    own = copy.deepcopy(teacher.denoiser.net)
    exact = held_for_adapters(teacher, TrainOptions(), bits)
    plain = tiny_teacher(name)
    for key, layer in teacher.denoiser.net.named_modules():
        other = plain.denoiser.net.get_submodule(key)
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter:
            with torch.no_grad():
                other.weight.copy_(widened(layer))  # type: ignore[union-attr, operator]
    found = []
    for each, unrounded in ((teacher, exact), (plain, None)):
        roles = Adapters(each, 2, 3.0, exact=unrounded)
        roles.add("fake", rank=4)
        for seed, role in enumerate(roles.names):
            shaken(nn.ParameterList(roles.parameters(role)), amount=0.7, seed=seed)
        x = torch.randn(2, *each.codec.shape, generator=torch.Generator().manual_seed(0))
        at = (torch.tensor([0.9, 0.4]), each.codec.encode(tiny_prompts(name, 2)))
        drawn = roles.student.predict(x, *at).x0
        with torch.no_grad():
            pull = roles["fake"].predict(drawn, *at).x0 - roles.teacher.predict(drawn, *at).x0
        loss = (drawn * pull).mean()
        loss.backward()
        found.append((loss.detach(), [value.grad for value in roles.parameters("student")]))
        assert all(type(value) is nn.Parameter for value in roles.parameters("student"))
        if unrounded is not None:
            made = roles.teacher.denoiser.plain_net().state_dict()
            assert all(torch.equal(value, made[key]) for key, value in own.state_dict().items())
            delta = lora_layers(roles.student.net)
            student = roles.student.plain_net().state_dict()
            for key, layer in delta.items():
                weight = own.state_dict()[f"{key}.weight"] + layer.get_delta_weight("student")
                torch.testing.assert_close(student[f"{key}.weight"], weight)
    (loss, grads), (wanted, theirs) = found
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    for grad, other in zip(grads, theirs, strict=True):
        assert grad is not None and other is not None
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_quantised_on_a_device_goes_there_in_bfloat16(bits: Any, saved: torch.dtype) -> None:
    """It is what it would be without that, and so is what is exported."""
    sets = ["student.lora_rank=2", f"student.base={bits}", "train.precision=bf16"]
    recipe = load_recipe(None, method="dmd", sets=sets)

    def pipe() -> Any:
        made = tiny_pipeline("sd3")
        made.transformer.to(saved).float()
        return made

    at_once, before = PipelineTeacher(pipe(), owned=True), pipe()
    own = {key: value.clone() for key, value in before.transformer.state_dict().items()}
    exact = round_on_host(before, None, recipe)
    assert exact is not None and all(torch.equal(exact[key], value) for key, value in own.items())
    assert {layer.weight.dtype for layer in matrices(before.transformer)} == {torch.bfloat16}
    rounded = PipelineTeacher(before, owned=True, exact=exact)
    assert held_for_adapters(rounded, recipe.train, bits) is exact
    held_for_adapters(at_once, recipe.train, bits)
    states = [plain_tensors(each.denoiser.net.state_dict()) for each in (at_once, rounded)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("bits", BITS)
def test_a_run_on_a_quantised_base_resumes_exactly_and_is_exported(bits: Any, tmp_path: Path) -> None:
    more = ("student.lora_rank=2", f"student.base={bits}", LOW, "train.checkpointing=true")
    whole, job = run(tmp_path / "whole", *more)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *more, last=2)
    parts, _ = run(tmp_path / "parts", *more, resume=True)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not any("base_layer" in key for key in whole)
    export_student(job, tmp_path / "student", [Start(command="none")])
    assert (tmp_path / "student" / "transformer").is_dir()


def test_a_missing_library_or_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="int8, which needs torchao, and that is not installed: pip install"):
        check_quantized("int8", torch.device("cpu"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="runs on cpu and cuda, and this run is on mps"):
        check_quantized("nf4", torch.device("mps"))
    with pytest.raises(UserError, match="a Sequential has no linear layers that carry adapters"):
        quantized(nn.Sequential(nn.Conv2d(1, 1, 1)), "int8", ["0"])


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["student.base=int8"], "without adapters nothing lies on one"),
        (["student.base=bf16", "student.lora_rank=2"], "both are one network: set both to bf16"),
        (
            ["student.base=nf4", "student.lora_rank=2", LOW, "train.teacher_precision=float32"],
            "set both to one",
        ),
        (
            ["student.base=nf4", "student.lora_rank=2", "train.parallel=sharded"],
            "set train.parallel=replicated",
        ),
        (["student.base=int8", "student.lora_rank=2", "train.compile=full"], "set train.compile=none"),
    ],
)
def test_what_does_not_go_with_a_base_is_one_line(sets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
