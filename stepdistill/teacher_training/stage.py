"""One training stage: a loop over numbered steps whose checkpoints continue bit for bit.

Every draw of step n comes from a generator of (seed, stage, n), the learning rate is a function of n, and a
checkpoint holds weights, their average and the optimiser's moments. A run that was killed therefore goes on
as if it had not been (exactly on a CPU; on a GPU up to the order in which the kernels add).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.system.files import folder_written_whole, remove_folder
from stepdistill.system.parsing import parse_json
from stepdistill.teacher_training.settings import StageSettings
from stepdistill.training.checkpoint import load_optimizer_state, optimizer_state

Network = TypeVar("Network", bound=nn.Module)

Loss = Callable[[torch.Generator], Tensor]
"""From the generator of a step to the loss of that step, a scalar that is a mean over the batch."""

OnStep = Callable[[str, int], None]
"""Called with (stage, steps done) after each step; may raise to stop the run where it stands."""


@dataclass
class History:
    """What a stage went through.

    Attributes:
        losses: the loss of every step.
        seconds: wall-clock time spent in steps, over all the runs that contributed.
    """

    losses: list[float]
    seconds: float

    def start(self) -> float:
        """Mean loss of the first twentieth of the steps."""
        return sum(self.losses[: self._part]) / self._part

    def end(self) -> float:
        """Mean loss of the last twentieth of the steps."""
        return sum(self.losses[-self._part :]) / self._part

    @property
    def _part(self) -> int:
        return max(len(self.losses) // 20, 1)


def seeded(build: Callable[[], Network], *key: int | str) -> Network:
    """A new module whose initialisation depends on the key alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_for(*key).initial_seed())
        return build()


def learning_rate(settings: StageSettings, step: int) -> float:
    """Linear from 0 over ``warmup`` steps, then a half cosine to 0 at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def _average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    for name, value in network.named_parameters():
        average[name].lerp_(value.detach(), 1 - decay)


def _numbered(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; what else begins so is one whose writing was cut off."""
    return sorted(folder.glob(f"step-{'[0-9]' * 6}"))


def _save(folder: Path, step: int, tensors: dict[str, Tensor], history: History) -> None:
    """Writes step-N/ whole, and only then removes what it replaces."""
    final = folder / f"step-{step:06d}"
    try:
        with folder_written_whole(final) as temporary:
            whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(whole, temporary / "state.safetensors")
            state = {"step": step, "seconds": history.seconds, "losses": history.losses}
            (temporary / "state.json").write_text(json.dumps(state))
    except (OSError, SafetensorError) as error:
        kept = _numbered(folder)
        left = f"{kept[-1].name} is intact" if kept else "there is none before it"
        raise UserError(f"cannot write checkpoint {final}: {error} ({left}); run again to go on") from error
    for old in _numbered(folder):
        if old != final:
            remove_folder(old)


def _load(folder: Path) -> tuple[int, dict[str, Tensor], History] | None:
    """The newest checkpoint as (step, tensors, history), or None where there is none."""
    kept = _numbered(folder)
    if not kept:
        return None
    try:
        state = parse_json((kept[-1] / "state.json").read_text())
        tensors = load_file(kept[-1] / "state.safetensors")
        return int(state["step"]), tensors, History(state["losses"], state["seconds"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {kept[-1]} is damaged ({error}): delete it to train this stage again"
        ) from error


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def train_stage(
    name: str,
    network: nn.Module,
    loss: Loss,
    settings: StageSettings,
    folder: Path,
    *,
    seed: int,
    checkpoint_every: int,
    on_step: OnStep | None = None,
) -> History:
    """Trains ``network`` in place, from its newest checkpoint where there is one, and leaves it with its
    final weights: the average where the stage keeps one, rounded to float16 (what is stored is then what the
    next stage has seen).

    Args:
        name: the stage's name, part of the key of its draws.
        network: on its device, with its initial weights.
        loss: the loss of one step.
        settings: steps, learning rate and so on.
        folder: where the stage's checkpoints go.
        seed: the run's seed.
        checkpoint_every: steps between checkpoints.
        on_step: see OnStep.

    Raises:
        UserError: a checkpoint cannot be read or written, or the loss is not finite.
    """
    device = next(network.parameters()).device
    # Matrices decay, biases and norms do not.
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(
        groups, lr=settings.lr, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda")
    )
    average = {k: v.detach().clone() for k, v in network.named_parameters()} if settings.ema else {}
    start, history = 0, History([], 0.0)
    found = _load(folder)
    if found is not None:
        start, tensors, history = found
        network.load_state_dict(_part(tensors, "network."))
        if start < settings.steps:
            load_optimizer_state(optimiser, _part(tensors, "optimiser."))
            average = {k: v.to(device) for k, v in _part(tensors, "average.").items()}

    network.train()
    waiting: list[Tensor] = []
    clock = time.perf_counter()
    with tqdm(total=settings.steps, initial=start, desc=name, unit="step", dynamic_ncols=True) as bar:
        for step in range(start, settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings, step)
            value = loss(generator_for(seed, name, step))
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            if settings.ema:
                _average(average, network, min(settings.ema, (1 + step) / (10 + step)))
            waiting.append(value.detach())
            last = step + 1 == settings.steps
            save = last or (step + 1) % checkpoint_every == 0
            # Reading a loss waits for the GPU: once in 20 steps is enough for the bar and to find a NaN.
            if save or len(waiting) == 20:
                history.losses += torch.stack(waiting).float().tolist()
                waiting = []
                bar.set_postfix(loss=f"{history.losses[-1]:.4f}", refresh=False)
                if not all(map(math.isfinite, history.losses[-20:])):
                    kept = _numbered(folder)
                    good = f"last good checkpoint {kept[-1]}" if kept else "no checkpoint yet"
                    raise UserError(f"{name}: the loss is not finite at or before step {step + 1} ({good})")
            if save:
                now = time.perf_counter()
                history.seconds, clock = history.seconds + now - clock, now
                if last:
                    network.load_state_dict(average, strict=False)
                    network.half().float()
                tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
                if not last:
                    tensors |= {f"optimiser.{k}": v for k, v in optimizer_state(optimiser).items()}
                    tensors |= {f"average.{k}": v for k, v in average.items()}
                _save(folder, step + 1, tensors, history)
            bar.update()
            if on_step is not None:
                on_step(name, step + 1)
    network.eval().requires_grad_(False)
    return history
