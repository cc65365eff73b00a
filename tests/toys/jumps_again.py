"""Gradients of a student that is told of a jump, with checkpointed blocks and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.families.condition import Condition


def check_blocks_that_run_again(roles: Any, x: Tensor, t: Tensor, cond: Condition, s: Tensor) -> None:
    """A jump from t to s [B] at x [B, ...] has the same gradients, bit for bit, where its blocks run again behind
    a call that was told of another jump."""

    def gradients() -> list[Tensor]:
        loss = roles.student.raw(x, t, cond, s).square().mean()
        with torch.no_grad():
            roles.student.raw(x, t, cond, 0.9 * t)
        return list(torch.autograd.grad(loss, roles.parameters("student"), allow_unused=True))

    wanted = gradients()
    with roles.checkpointed():
        again = gradients()
    assert any(one is not None and bool(one.any()) for one in wanted)
    for one, other in zip(wanted, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
