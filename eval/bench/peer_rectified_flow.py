"""rectified-flow's loss at the embedded flow teacher, on pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peer import Called, Ours, Pair, Update
from rectified_flow.rectified_flow import RectifiedFlow
from torch import Tensor


def pairs(batch: int) -> Iterator[Pair]:
    """Their time runs the other way: 0 is noise, and the velocity points to data."""
    ours = Ours("reflow", "emoji-flow", batch, {"guidance": 3.0, "pairs": batch, "pair_steps": 2})
    given = ours.batch()
    pair, net = given.pairs, Called(ours.net("student"), ours.job.teacher.denoiser).requires_grad_(True)
    assert pair is not None

    def velocity(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return -net(x, 1000 * (1 - t), cond)

    theirs = RectifiedFlow(tuple(pair.x0.shape[1:]), velocity, is_independent_coupling=False)
    t = given.draws.uniform("time", ours.method.options.t_min, 1.0)
    update = Update(
        lambda: theirs.get_loss(pair.noise, pair.x0, 1 - t, cond=pair.cond),
        lambda step: theirs.get_loss(
            pair.noise, pair.x0, theirs.sample_train_time(batch, expand_dim=False), cond=pair.cond
        ),
        list(net.parameters()),
        [net],
    )
    yield Pair("reflow", ours.update("student", given), update, batch)
