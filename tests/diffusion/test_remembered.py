"""What is kept of a tensor of times: the very answer while it is the same tensor, and nothing that could go wrong."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.diffusion.change_of_path import STRAIGHT, on_other_path
from stepdistill.diffusion.path import EDMPath, FlowPath, Path, TablePath, TrigPath
from stepdistill.diffusion.remembered import at_time, constant, remembered

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
PATHS: dict[str, Path] = {
    "flow": FlowPath(),
    "trig": TrigPath(),
    "edm": EDMPath(80.0),
    "table": TablePath.from_alphas_cumprod(ALPHAS),
}


class Operators(TorchDispatchMode):
    """Names of the operators that are run within it, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ != "detach":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Asked:
    """A function of times that says how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    @remembered
    def square(self, power: int, t: Tensor) -> Tensor:
        self.runs += 1
        return t**power


def test_an_answer_is_kept_for_the_very_tensor_and_its_arguments() -> None:
    asked, t = Asked(), torch.tensor([0.5, 0.25])
    first = asked.square(2, t)
    assert asked.square(2, t) is first and asked.runs == 1
    assert asked.square(3, t)[0] == 0.125 and asked.runs == 2
    assert torch.equal(asked.square(2, t.clone()), first) and asked.runs == 3
    assert Asked().square(2, t) is not first
    t[0] = 3.0
    assert asked.square(2, t).tolist() == [9.0, 0.0625] and asked.runs == 4
    gone = weakref.ref(asked.square(2, t))
    del t
    gc.collect()
    assert gone() is None


def test_what_has_a_graph_or_a_derivative_is_never_kept() -> None:
    asked, t = Asked(), torch.tensor([0.5])
    leaf = t.clone().requires_grad_()
    for _ in range(2):  # a kept answer would have lost its graph at the first backward pass
        asked.square(2, leaf).sum().backward()
    assert leaf.grad.tolist() == [2.0] and asked.runs == 2
    plain = asked.square(2, t)
    for _ in range(2):
        assert torch.func.jvp(lambda s: asked.square(2, s), (t,), (torch.ones(1),))[1].tolist() == [1.0]
        # Times that a derivative only closes over are answered as plain ones.
        said, rate = torch.func.jvp(lambda x: x * asked.square(3, t), (t,), (torch.ones(1),))
        assert said.tolist() == [0.0625] and rate.tolist() == [0.125]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones(1))
        assert forward_ad.unpack_dual(asked.square(2, dual)).tangent.tolist() == [1.0]
    with torch.inference_mode():
        asked.square(4, t)
    assert not asked.square(4, t).is_inference() and asked.square(2, t) is plain


def test_one_time_and_numbers_are_one_tensor_of_the_default_type() -> None:
    like = torch.zeros(3, 2)
    t = at_time(0.5, like)
    assert t.tolist() == [0.5] * 3 and at_time(0.5, like) is t and at_time(0.5, like[:2]) is not t
    assert constant((1, 0), t.device) is constant([1.0, 0.0], t.device)
    torch.set_default_dtype(torch.float64)
    try:
        assert at_time(0.5, like).dtype == constant([1.0, 0.0], t.device).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", PATHS)
def test_a_time_is_looked_up_once(name: str) -> None:
    """A second noising, reading and change of path at the same times run what touches the states, and nothing else."""
    path, t, x = PATHS[name], torch.tensor([0.3, 0.70001]), torch.randn(2, 3)

    def use() -> list[Tensor]:
        said = path.read(x, "v", x, t)
        return [path.noised(x, x, t), said.x0, said.eps, on_other_path(path, x, t, STRAIGHT)[0]]

    first = use()
    with Operators() as seen:
        again = use()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    of_states = ["mul", "mul", "sub", "mul", "mul", "sub", "mul", "mul", "add", "mul"]
    if name == "table":
        assert seen.names == of_states
    assert len(seen.names) <= len(of_states) + 8


@pytest.mark.parametrize("near", [1e-4, 1e-3])
def test_a_place_near_an_entry_is_the_entry_and_keeps_its_derivative(near: float) -> None:
    path = TablePath.from_alphas_cumprod(ALPHAS)
    t = torch.tensor([0.0, 0.2 + 0.9 * near / 1000, 0.2 + 1.1 * near / 1000, 1.0], dtype=torch.float64)
    place, rate = torch.func.jvp(lambda s: path.position(s, near), (t,), (torch.ones_like(t),))
    assert place[[0, 1, 3]].tolist() == [0.0, 200.0, 1000.0]
    assert float(place[2]) == pytest.approx(200 + 1.1 * near, abs=1e-9)
    assert rate.tolist() == [1000.0] * 4
    slope = torch.func.jvp(lambda s: path.alpha_sigma(s)[0], (t,), (torch.ones_like(t),))[1]
    assert torch.allclose(slope, path.rates(t)[0], rtol=1e-9)


def test_paths_do_not_share_their_answers() -> None:
    t, small = torch.tensor([0.25, 0.5]), TablePath.from_alphas_cumprod(ALPHAS[::10])
    paths: list[Path] = [*PATHS.values(), small]
    said = [path.alpha_sigma(t)[0].tolist() for path in paths]
    assert len({tuple(alpha) for alpha in said}) == len(paths)
    assert [path.alpha_sigma(t)[0].tolist() for path in paths] == said
