"""A student's own grid and steps on a flow path: with fresh noise between steps, or without.

This file travels inside a student distilled by stepdistill on a flow path, where no stock scheduler draws as it does.

With fresh noise, a step goes to x0 and from there up to the next time (consistency sampling). Stock schedulers take
that noise from the generator of the pipeline's call, which StableDiffusion3Pipeline hands to none, and so from the
global one. Here it follows from the noise that a picture starts from: a seed gives one picture, alone or in any batch,
on any device. Without it, a step is one of Euler's.

The grid follows from the number of steps alone. What a pipeline passes for it is made for many steps (CogView4Pipeline
would take the last of few at timestep 1), and is not used. It is loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput


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


class FlowConsistencyScheduler(FlowMapEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' FlowMapEulerDiscreteScheduler, with the grid 1, 1 - 1/n ... 1/n after ``shift`` in any pipeline.

    Args:
        num_train_timesteps: what the network is told at pure noise.
        shift: of the grid, t = s u / (1 + (s - 1) u).
        clock_shift: the network is told the u of this shift in place of t.
        renoise: whether there is fresh noise between steps.
        invert_sigmas: the network is told 1 - t and says the velocity negated, and ``sigmas`` are 1 - t, as under
            FlowMatchEulerDiscreteScheduler's key of this name.
        base_image_seq_len, max_image_seq_len, base_shift, max_shift: not used; some pipelines work ``mu`` out from
            these, and ask no scheduler whether it has them.
    """

    # The bare name, also when diffusers has loaded the file as a dynamic module: it is what a saved pipeline writes.
    __module__ = "flow_consistency"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        clock_shift: float = 1.0,
        renoise: bool = True,
        invert_sigmas: bool = False,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> None:
        super().__init__(num_train_timesteps, shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """The grid of so many steps; what is drawn next is a new picture. Of ``sigmas`` and ``timesteps`` only the
        length is used, and ``mu``, the time shift that some pipelines work out from the size, is not."""
        given = next((list(values) for values in (sigmas, timesteps) if values is not None), [])
        super().set_timesteps(num_inference_steps or len(given), device)
        t, s = self.sigmas[:-1], self.config.clock_shift
        told = t / (s + (1 - s) * t)
        if self.config.invert_sigmas:
            told, self.sigmas = 1 - told, 1 - self.sigmas
        self.timesteps = self.config.num_train_timesteps * told
        self._keys: list[bytes] | None = None
        self._calls = 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
        per_token_timesteps: Any = None,
    ) -> Any:
        """The state at the next time s: (1 - s) x0 + s noise, fresh or the predicted one; x0 itself after the last.

        Args:
            model_output: the velocity [B, ...] at the sample.
            timestep: one of ``timesteps``.
            sample: the state [B, ...]; at the first call after ``set_timesteps`` the noise that pictures start from.
            return_dict: an output object, or a tuple.
            per_token_timesteps: a pipeline that has them hands over the velocity negated, as for
                FlowMatchEulerDiscreteScheduler, which counts from the next time to this one with them.

        Raises:
            ValueError: for a timestep that is not of the grid.
        """
        index = self.index_for_timestep(timestep)
        if index is None:
            raise ValueError(f"timestep {timestep} is not one of {self.timesteps.tolist()}")
        if self._keys is None:
            self._keys = keys_of(sample)
        t, s = (float(self.sigmas[i]) for i in (index, index + 1))
        t, s = (1 - t, 1 - s) if self.config.invert_sigmas else (t, s)
        negated = self.config.invert_sigmas or per_token_timesteps is not None
        velocity = -model_output.float() if negated else model_output.float()
        if self.config.renoise:
            x = sample.float() - t * velocity
            if s > 0:
                x = (1 - s) * x + s * noise_after(self._keys, self._calls, x)
        else:
            x = sample.float() + (s - t) * velocity
        self._calls += 1
        self._step_index = index + 1
        x = x.to(model_output.dtype)
        return FlowMapEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The config, and this file, without which it cannot be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "flow_consistency.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
