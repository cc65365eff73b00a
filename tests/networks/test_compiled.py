"""Compiled networks: the same modules, parameters and losses; how many forms; what is not compiled, or refused."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from tiny import shaken, tiny_pipeline, tiny_prompts, tiny_teacher
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import cpp_compiler_search

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.networks.compiled import Compile, check_compile, compiled, compiled_parts, uncompiled
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.derivative import directional_derivative
from stepdistill.networks.lora import SharedNetwork
from stepdistill.recipes.recipe import load_recipe
from stepdistill.testing.contract import batch_for, build
from stepdistill.testing.toys import SHAPE, ToyFamily
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.parallel import take_turn
from stepdistill.training.training_data import training_data

CPU = torch.device("cpu")


def forms() -> int:
    """How many compiled forms were made since the test began."""
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _traced_alone() -> Iterator[None]:
    """Forms are traced, guarded and counted, and run operator by operator: to compile one takes seconds."""
    counters.clear()
    logging.getLogger("torch.__trace").disabled = True  # it writes a page for each where pytest listens
    with torch.compiler.set_stance(force_backend="eager"):
        yield


def losses_of(name: str, kind: Compile, steps: int = 6) -> list[float]:
    """Of a method between perceptrons, by plain gradient steps of the networks whose turn it is."""
    method = build(name)
    networks = {key: one.parameters(method.roles) for key, one in method.trained().items()}
    nets, found = list(method.roles.stored().values()), list[float]()
    keys = [list(net.state_dict()) for net in nets]
    with compiled(nets, kind, same_sizes=method.same_calls) as begin:
        for step in range(steps):
            begin()
            turn = method.turn(step)
            take_turn(networks, turn.network)
            loss = method.loss(turn, batch_for(method, step=step)).value
            found.append(float(loss.detach()))
            parameters = networks[turn.network]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 1e-3 * gradient
            method.after_step(turn)
        assert keys == [list(net.state_dict()) for net in nets]
    return found


def test_compiled_networks_give_the_losses_of_plain_ones_in_few_forms() -> None:
    """To the last bit, over turns of DMD's two networks; a form with a graph and one without."""
    plain = losses_of("dmd", "none")
    assert forms() == 0
    assert losses_of("dmd", "full") == plain
    assert forms() == 2


def test_an_exact_derivative_is_taken_of_the_network_as_it_is() -> None:
    net, at = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), (torch.ones(1, 2), torch.full((1, 2), 0.5))
    plain = directional_derivative(net, at[:1], at[1:])
    with compiled([net], "full", same_sizes=True):
        assert torch.equal(directional_derivative(net, at[:1], at[1:]), plain)
    assert forms() == 0


def test_after_training_a_network_is_as_it_was_and_copies_never_are_compiled() -> None:
    net = nn.Linear(2, 2)
    before, kept = set(vars(net)), [id(value) for value in net.parameters()]
    with pytest.raises(ZeroDivisionError), compiled([net], "full", same_sizes=True):
        x = net(torch.ones(1, 2))
        assert forms() == 1
        copy.deepcopy(net)(torch.ones(1, 2).double().float().requires_grad_())
        with uncompiled():
            assert torch.equal(net(torch.ones(1, 2, requires_grad=True)), x)
        assert forms() == 1
        _ = 1 / 0
    net(torch.ones(3, 2, requires_grad=True))
    assert forms() == 1 and set(vars(net)) == before and [id(value) for value in net.parameters()] == kept


def test_sizes_are_compiled_each_or_all_at_once() -> None:
    for same, expected in ((True, 3), (False, 2)):
        counters.clear()
        net = nn.Linear(2, 2)
        with compiled([net], "full", same_sizes=same):
            for count in (2, 3, 4):
                net(torch.ones(count, 2))
            assert forms() == expected


class Block(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x).tanh()


class Blocks(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = Block(2, 2), Block(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        said: Tensor = self.last(self.inner(self.first(x.flatten(1) + t[:, None])))
        return said.view_as(x)


def test_features_inside_a_compiled_block_are_those_of_plain_calls() -> None:
    """With their gradients. Two blocks have two forms, as the input of the first has no gradient."""
    torch.manual_seed(0)
    own = Denoiser(Blocks(), FlowPath(), "velocity", ToyFamily())
    x, t = torch.randn(3, *SHAPE), torch.full((3,), 0.5)

    def found() -> list[Tensor]:
        features = own.features(x, t, Condition())
        first = own.net.get_submodule("first").parameters()
        return [
            own.raw(x, t, Condition()),
            features,
            *torch.autograd.grad(features.square().sum(), list(first)),
        ]

    plain = found()
    for kind, expected in (("regional", 2), ("full", 1)):
        counters.clear()
        with compiled([own.net], kind, same_sizes=True):  # type: ignore[arg-type]
            assert all(torch.equal(one, other) for one, other in zip(plain, found(), strict=True))
        assert forms() == expected


def test_a_form_is_made_for_each_adapter_that_is_on() -> None:
    torch.manual_seed(0)
    shared = SharedNetwork(Blocks(), ["first", "inner"])
    x, t = torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    for name in ("a", "b"):
        shared.add(name, 1, 1.0)
        shaken(nn.ParameterList(shared.weights(name).values()), amount=0.7)

    def found() -> list[Tensor]:
        said = []
        for name in ("a", None, "b", "a", None):
            with torch.no_grad(), shared.on(name):
                said.append(shared.net(x, t, Condition()))
        return said

    plain = found()
    assert not torch.equal(plain[0], plain[1])
    with compiled([shared.net], "full", same_sizes=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, found(), strict=True))
    assert forms() == 3


def test_a_run_is_compiled_while_it_trains(tmp_path: Path) -> None:
    rows, made = [], []
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_prompts("sd", 4)))
    for kind in ("none", "regional"):
        folder = tmp_path / kind
        sets = [
            f"data.prompts={tmp_path}/prompts.txt",
            "train.updates=2",
            "train.batch=2",
            "train.preview_every=1",
        ]
        sets += ["options.fake_warm_start=0", f"train.compile={kind}", "evaluate=false", "train.keep=1"]
        recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(recipe), accelerator, tiny_pipeline("sd"))
        folder.mkdir()
        train(job.objective, training_data(job, folder), recipe, folder, accelerator)
        rows.append([json.loads(line)["loss"] for line in (folder / "stats.jsonl").read_text().splitlines()])
        made.append(forms())
    assert rows[0] == rows[1] and made[0] == 0 < made[1] <= 4


def test_a_network_without_blocks_is_refused_before_its_output_is_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    sets = ["student.output=v", "train.compile=regional", "options.guidance=1"]
    recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
    with pytest.raises(UserError, match="UNet2DModel names no blocks that repeat"):
        assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("unet-ddpm"))
    assert not list(tmp_path.rglob("*"))


def test_what_cannot_be_compiled_is_refused_with_what_can() -> None:
    check_compile("none", CPU, "triton", "sharded")
    check_compile("full", CPU, "sdpa", "auto")
    with pytest.raises(
        UserError, match="graphs need cuda, and this runs on cpu: choose one of none, regional, full"
    ):
        check_compile("graphs", CPU, "sdpa", "auto")
    with pytest.raises(
        UserError, match=r"not compiled with train\.attention=triton: set that to auto or sdpa or math"
    ):
        check_compile("regional", CPU, "triton", "auto")
    with pytest.raises(UserError, match=r"not compiled with train\.parallel=sharded"):
        check_compile("full", CPU, "sdpa", "sharded")
    with pytest.raises(UserError, match="UNet2DModel names no blocks that repeat: set full or none"):
        compiled_parts(tiny_teacher("unet-ddpm").denoiser.net, "regional")
    cpp_compiler_search.cache_clear()
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"C\+\+ compiler"),
    ):
        check_compile("full", CPU, "sdpa", "auto")
    cpp_compiler_search.cache_clear()
