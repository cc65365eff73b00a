"""Copies to a device: the same numbers, and a GPU is not waited for."""

from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import TablePath
from stepdistill.system.memory import sent


def test_what_is_there_already_is_not_copied() -> None:
    x = torch.ones(3)
    assert sent(x, torch.device("cpu")) is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_and_a_tables_times_do_not_wait_for_a_gpu() -> None:
    cuda = torch.device("cuda")
    path = TablePath.from_alphas_cumprod(torch.linspace(0.99, 0.01, 1000))
    times = torch.full((4,), 0.5, device=cuda)
    drawn, here = Draws(0, 0, 0, 4, cuda), Draws(0, 0, 0, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [drawn.normal("a", (3,)), drawn.uniform("b"), drawn.integers("c", 9)]
        alpha, _ = torch.func.jvp(lambda t: path.alpha_sigma(t)[0], (times,), (torch.ones_like(times),))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = [here.normal("a", (3,)), here.uniform("b"), here.integers("c", 9)]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    assert torch.allclose(alpha.cpu(), path.alpha_sigma(times.cpu())[0])
