"""The time shift of flow models, t = s u / (1 + (s - 1) u): where a schedule that is even in u puts its times.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2403.03206, 5.3.2. Larger
images need more noise to be hidden, so a teacher is trained and sampled with s > 1, more of its steps at high noise.
Every time that is evenly spread here goes by it: pairs, grids, times of scores, a student's default times.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar

from torch import Tensor

from stepdistill.errors import UserError

Times = TypeVar("Times", float, Tensor)

OTHER_SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
)
"""Keys of diffusers' flow schedulers whose spacing no time shift has."""


def counts_up(scheduler: Any) -> bool:
    """Whether a scheduler's noise levels rise from 0 to 1 as noise goes, as under ``invert_sigmas``."""
    sigmas: Any = getattr(scheduler, "sigmas", ())
    return len(sigmas) > 1 and bool(sigmas[0] < sigmas[-1])


def shifted(u: Times, s: float) -> Times:
    """t of u, in [0, 1]; exact at both ends, and u itself for s = 1. The inverse is the shift by 1 / s."""
    return u if s == 1 else 1 - (1 - u) / (1 + (s - 1) * u)


def shift_of(scheduler: Any, tokens: int, stretched: bool = False) -> float:
    """The s with which a diffusers flow scheduler spaces its times: the ``shift`` of its config, or the dynamic one,
    exp(mu) or for ``linear`` mu, with mu linear in the image tokens, as the pipelines compute it.

    Args:
        scheduler: of a flow teacher.
        tokens: image tokens at the size that is drawn.
        stretched: whether times may be stretched after the shift, to end at ``shift_terminal``, as a sampler's matter.

    Raises:
        UserError: where its times are no time shift of even ones.
    """
    config, read = scheduler.config, _read_by(scheduler)
    found = [key for key in OTHER_SPACINGS if read.get(key) and not (stretched and key == "shift_terminal")]
    if found:
        raise UserError(
            f"the teacher's {type(scheduler).__name__} has {found[0]}={read[found[0]]}, a spacing of times that is "
            "no time shift: give one in options.shift"
        )
    if not read.get("use_dynamic_shifting"):
        # DPMSolver, UniPC and their like in flow mode have it under another name.
        return float(read.get("shift", read.get("flow_shift", 1.0)))
    # Those name no lengths, and the pipelines take these.
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return float(mu if read.get("time_shift_type") == "linear" else math.exp(mu))


def _read_by(scheduler: Any) -> dict[str, Any]:
    """What of its config a scheduler reads itself: ``from_config`` also keeps what another class had, unread."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in own}
