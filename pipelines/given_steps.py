"""Steps at times that are given one by one: the first few along the teacher's ODE, the others with fresh noise or none.

This file travels inside a pipeline made by stepdistill's ``hybrid``: its first steps are the teacher's, which keep the
noise that they predict, and its others are a student's, which may take fresh noise. No stock scheduler does both. Fresh
noise follows from the noise that a picture starts from: a seed gives one picture, alone or in any batch, on any device.
It is loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput


def keys_of(start: torch.Tensor) -> list[bytes]:
    """What the later noises of each picture follow from: SHA-256 of its start, one of B rows [B, ...] in float32."""
    rows = start.detach().to("cpu", torch.float32).contiguous()
    return [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]


def noise_after(keys: Sequence[bytes], call: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise [B, ...] that follows network call ``call``, drawn on the CPU for each picture alone."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(key + call.to_bytes(4, "little")).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like.device)


def read(
    output: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, eps) that a network's output [B, ...] of a kind says of x = alpha x0 + sigma eps.

    Raises:
        ValueError: for another kind.
    """
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "flow_prediction":
        return x - sigma * output, x + alpha * output
    raise ValueError(f"prediction_type {kind!r} is not known here")


@dataclass
class GivenStepsOutput(BaseOutput):  # type: ignore[misc]
    """A step's result.

    Attributes:
        prev_sample: the state at the next time [B, ...].
        pred_original_sample: the clean sample that the network predicts [B, ...].
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class GivenStepsScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """States are alpha x0 + sigma eps; the step after the last time goes to x0 itself.

    Args:
        steps: what the pipeline tells its network at each step, descending.
        alphas, sigmas: of the state that each step starts from.
        plain: how many of the first steps keep the noise that the network predicts.
        renoise: whether the others take fresh noise.
        prediction_type: what the network says.
        num_train_timesteps: of the teacher; pipelines ask for it.
    """

    # The bare name, also when diffusers has loaded the file as a dynamic module: it is what a saved pipeline writes.
    __module__ = "given_steps"
    order = 1

    @register_to_config
    def __init__(
        self,
        steps: Sequence[float] = (999.0,),
        alphas: Sequence[float] = (0.0,),
        sigmas: Sequence[float] = (1.0,),
        plain: int = 0,
        renoise: bool = False,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
    ) -> None:
        self.init_noise_sigma = 1.0
        self.set_timesteps(len(steps))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begins a new picture. Of ``sigmas`` and ``timesteps`` only the length is read, and ``mu`` is not.

        Raises:
            ValueError: for another number of steps than there are.
        """
        given = next((list(values) for values in (sigmas, timesteps) if values is not None), [])
        count, steps = num_inference_steps or len(given), list(self.config.steps)
        if count != len(steps):
            raise ValueError(f"it draws in {len(steps)} steps alone, and was asked for {count}")
        whole = all(float(step).is_integer() for step in steps)
        self.timesteps = torch.tensor(steps, dtype=torch.int64 if whole else torch.float32, device=device)
        self.sigmas = torch.tensor([*self.config.sigmas, 0.0], device=device)
        self.num_inference_steps = count
        self._calls, self._keys = 0, list[bytes]()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines say where they begin, which is always the first step."""
        return None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The state as it is."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> Any:
        """The state at the next time.

        Args:
            model_output: of the network [B, ...].
            timestep: the next of ``timesteps``; steps are taken in their order.
            sample: the state [B, ...]; at the first step the noise that pictures start from.
            return_dict: an output object, or a tuple.
        """
        index, config, last = self._calls, self.config, len(self.config.steps) - 1
        if index == 0:
            self._keys = keys_of(sample)
        alpha, sigma = config.alphas[index], config.sigmas[index]
        x0, eps = read(model_output.float(), sample.float(), alpha, sigma, config.prediction_type)
        self._calls += 1
        if index == last:
            after = x0
        else:
            fresh = config.renoise and index >= config.plain
            noise = noise_after(self._keys, index, x0) if fresh else eps
            after = config.alphas[index + 1] * x0 + config.sigmas[index + 1] * noise
        after, x0 = after.to(model_output.dtype), x0.to(model_output.dtype)
        return GivenStepsOutput(prev_sample=after, pred_original_sample=x0) if return_dict else (after, x0)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The config, and this file, without which it cannot be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "given_steps.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
