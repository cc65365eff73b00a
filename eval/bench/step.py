"""How much a unit of training costs beside its bare network passes, in one process: python eval/bench/step.py

A unit is what the loop does: batch, draws, losses, backward, clipping, AdamW, averages, log; for dmd of one student
update and k of the fake network, for the others of one update. Bare are the passes that it cannot do without, on ready
tensors, with guidance as one forward of 2 B by the teacher:

dmd       student forward and backward, teacher, fake forward; k times student forward, fake forward and backward
lcm       student forward and backward, teacher, target forward
scm       student forward and backward, teacher, student with its derivative (torch.func.jvp)
meanflow  the same, the student told two times
reflow    student forward and backward

Both are timed in turns, and ratios are of medians: of the unit over its passes, and over passes, clipping and AdamW,
which any training has. Those weigh by parameters and not by samples: a large network at a small batch has much of them.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.derivative import directional_derivative
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.provenance import provenance
from stepdistill.training import assemble as assembling
from stepdistill.training.arithmetic import autocast
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.parallel import take_turn
from stepdistill.training.run import Run
from stepdistill.training.training_data import training_data

WARM, TIMED = 2, 3
"""Units of a short run that are left out, as the first ones make the optimisers' state, and units that are timed."""

OPTIONS: dict[str, dict[str, Any]] = {
    "dmd": {},
    "lcm": {},
    "scm": {"tangent_warmup": 0, "derivative": "exact"},
    "meanflow": {"tangent_warmup": 0, "warm_start": 0, "derivative": "exact"},
    "reflow": {},
}
"""By method, with which it does from its first update what it does for most of a run."""

Trained = dict[str, list[torch.nn.Parameter]]


def unit_seconds(job: Assembled, accelerator: Accelerator, folder: Path, fake_updates: int) -> float:
    """Seconds of a unit of a short run, once the run is under way: the mean of its last ones."""
    data = training_data(job, folder)
    with patch.object(Run, "save", lambda *_: None):  # nothing here is resumed
        train(job.objective, data, job.recipe, folder, accelerator)
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    unit = fake_updates + 1
    return float(rows[-1]["seconds"] - rows[WARM * unit - 1]["seconds"]) / TIMED


def trained_parameters(job: Assembled) -> Trained:
    """What each network trains."""
    return {name: job.objective.weights(name) for name in job.objective.trained}


class Bare:
    """Passes on ready tensors.

    Args:
        job: whose networks.
        trained: what each of them trains.
        batch: samples.
    """

    def __init__(self, job: Assembled, trained: Trained, batch: int) -> None:
        self.job, self.trained, self.device = job, trained, job.accelerator.device
        self.x = torch.randn(batch, *job.teacher.codec.shape, device=self.device)
        self.t = 0.01 + 0.98 * torch.rand(batch, device=self.device)
        self.cond = job.teacher.codec.encode([job.prompts[i % len(job.prompts)] for i in range(batch)])

    def _autocast(self) -> Any:
        return autocast(self.job.recipe.train.precision, self.device)

    def role(self, name: str) -> Denoiser:
        return self.job.method.roles[name]

    def learn(self, name: str, s: Tensor | None = None) -> None:
        """Forward and backward of a network that is trained."""
        take_turn(self.trained, name)
        with self._autocast():
            value = self.role(name).raw(self.x, self.t, self.cond, s).square().mean()
        torch.autograd.grad(value, self.job.method.roles.parameters(name))

    @torch.no_grad()
    def look(self, name: str) -> None:
        """Forward of a network without a graph."""
        with self._autocast():
            self.role(name).raw(self.x, self.t, self.cond)

    @torch.no_grad()
    def guide(self) -> None:
        """Forward of the teacher, of 2 B where it is guided."""
        teacher, x, t, cond = self.job.teacher, self.x, self.t, self.cond
        if teacher.null is not None and self.job.options.guidance != 1:
            x, t, cond = torch.cat([x, x]), torch.cat([t, t]), cond.join(cond)
        with self._autocast():
            teacher.denoiser.raw(x, t, cond)

    def derive(self, s: Tensor | None = None) -> None:
        """Forward of the student with its derivative along state and time."""
        moves = (torch.ones_like(self.x), torch.ones_like(self.t))
        student = self.role("student")
        directional_derivative(lambda x, t: student.raw(x, t, self.cond, s), (self.x, self.t), moves, "exact")

    def passes(self, method: str, fake_updates: int) -> None:
        """Those of one unit of a method."""
        s = self.t / 2 if method == "meanflow" else None
        self.learn("student", s)
        if method != "reflow":
            self.guide()
        if method in ("scm", "meanflow"):
            self.derive(s)
        elif method in ("dmd", "lcm"):
            self.look("fake" if method == "dmd" else "target")
        for _ in range(fake_updates):
            self.look("student")
            self.learn("fake")


def bare_seconds(job: Assembled, trained: Trained, batch: int, fake_updates: int) -> float:
    """Seconds of the network passes of one unit."""
    bare = Bare(job, trained, batch)
    synchronize(bare.device)
    began = time.perf_counter()
    bare.passes(job.recipe.method, fake_updates)
    synchronize(bare.device)
    seconds = time.perf_counter() - began
    for parameters in trained.values():  # as a run finds them
        for parameter in parameters:
            parameter.requires_grad_(True)
    return seconds


def update_stepper(job: Assembled, trained: Trained, fake_updates: int) -> Callable[[], float]:
    """Seconds of clipping and AdamW in one unit, on ready gradients; weights stay as they are."""
    turns = ["student", *["fake"] * fake_updates]
    device = job.accelerator.device
    optimizers = {name: torch.optim.AdamW(trained[name], lr=0.0, fused=True) for name in set(turns)}

    def seconds() -> float:
        took = 0.0
        for name in turns:
            for parameter in trained[name]:
                parameter.grad = torch.full_like(parameter, 1e-3)
            synchronize(device)
            began = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(trained[name], 1.0)
            optimizers[name].step()
            synchronize(device)
            took += time.perf_counter() - began
            optimizers[name].zero_grad(set_to_none=True)
        return took

    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unet60() -> Any:
    """A pipeline of Stable Diffusion's kind around a UNet of 60 M random weights; its other parts are small."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from stepdistill.system.emoji import tokenizer_folder

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=2046,
        eos_token_id=2047,
        pad_token_id=2047,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder()),
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(128, 256, 480),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=256,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assembled(method: str, teacher: str, batch: int, fake_updates: int, folder: Path) -> Assembled:
    """A short run of a method with its default options but for guidance, which all have, and few pairs."""
    options: dict[str, Any] = {"guidance": 3.0, **OPTIONS[method]}
    options |= {"fake_updates": fake_updates} if method == "dmd" else {"pairs": batch, "pair_steps": 2}
    steps = (WARM + TIMED) * (fake_updates + 1)
    said: dict[str, Any] = {"method": method, "teacher": teacher, "options": options}
    said["student"] = {"output": "teacher"}
    said["train"] = {"batch": batch, "updates": steps, "preview_every": 0, "average": 0.99}
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if teacher == "emoji":
        return assemble(resolve(Recipe.model_validate(said)), accelerator)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red heart\na blue fish\n")
    said["data"] = {"prompts": str(prompts)}
    with patch.object(assembling, "check_export", lambda *_: None):  # nothing is drawn or exported
        return assemble(resolve(Recipe.model_validate(said)), accelerator, unet60())


def measure(method: str, teacher: str, batch: int, fake_updates: int, repeats: int) -> str:
    """A line of the table."""
    units, bares, updates = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = assembled(method, teacher, batch, fake_updates, folder)
        trained = trained_parameters(job)
        update = update_stepper(job, trained, fake_updates)
        for repeat in range(repeats + 1):
            found = (
                unit_seconds(job, job.accelerator, folder, fake_updates),
                statistics.mean(bare_seconds(job, trained, batch, fake_updates) for _ in range(TIMED)),
                statistics.mean(update() for _ in range(TIMED)),
            )
            if repeat:  # the first round warms up
                for values, value in zip((units, bares, updates), found, strict=True):
                    values.append(value)
    unit, bare, step = (statistics.median(values) for values in (units, bares, updates))
    numbers = f"{unit * 1e3:>9.0f}{bare * 1e3:>9.0f}{unit / bare:>8.3f}"
    return f"{method:<10}{numbers}{step * 1e3:>9.0f}{unit / (bare + step):>8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--teacher", choices=("emoji", "unet60"), default="emoji")
    parser.add_argument("--batch", type=int, help="64, and 8 for unet60")
    parser.add_argument("--fake-steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="7, and 2 for unet60")
    chosen = parser.parse_args()
    batch, repeats = (64, 7) if chosen.teacher == "emoji" else (8, 2)
    batch, repeats = chosen.batch or batch, chosen.repeats or repeats
    print(f"{chosen.teacher}, batch {batch}, {repeats} rounds, {provenance()['hardware']}")
    print(f"{'':<10}{'unit ms':>9}{'passes':>9}{'ratio':>8}{'update':>9}{'of both':>8}")
    for method in chosen.method:
        fake_updates = chosen.fake_updates if method == "dmd" else 0
        print(measure(method, chosen.teacher, batch, fake_updates, repeats), flush=True)


if __name__ == "__main__":
    main()
