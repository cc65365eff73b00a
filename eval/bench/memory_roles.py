"""Peak memory of a DMD unit with LoRA: who follows the student as a copy, and as an adapter on the one network.

python eval/bench/memory_roles.py                   # a UNet of 61 M parameters, batch 4, rank 16
python eval/bench/memory_roles.py --batch 1 --checkpoint

Every line is two units of a process of its own on the CPU: the fake network's update and the student's, with AdamW. The
peak is that of the whole process; ``loaded`` has made the teacher and called it once without a graph, so the rest is
what training takes. ``fine-tune`` is an ordinary LoRA of the same network on noised samples: what adapters cannot get
below. ``copies`` is a LoRA student on a network of its own and a fake network that is trained whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

LINES = ("loaded", "fine-tune", "adapters", "copies", "all weights")


def peak_of(line: str, batch: int, rank: int, checkpoint: bool) -> dict[str, float]:
    """Peak of this process in MiB after the line's work, and millions of parameters in memory."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from stepdistill.diffusion.draws import Draws
    from stepdistill.families.condition import Condition
    from stepdistill.losses.batch import Batch
    from stepdistill.losses.fake_score import denoising_loss
    from stepdistill.methods.dmd import DMD
    from stepdistill.networks.roles import Adapters, Copies, Roles
    from stepdistill.networks.teacher import PipelineTeacher
    from stepdistill.training.parallel import take_turn

    torch.manual_seed(0)
    net: Any = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(128, 256, 384, 512),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    if checkpoint:
        net.enable_gradient_checkpointing()
    pipe = DDPMPipeline(unet=net, scheduler=DDPMScheduler())
    teacher = PipelineTeacher(pipe)

    def drawn(step: int) -> Batch:
        draws = Draws(0, step, 0, batch)
        return Batch(draws, teacher.codec.shape, Condition(), torch.zeros(batch))

    roles: Roles
    if line == "loaded":
        teacher.predict(drawn(0).noise, torch.full((batch,), 0.5), Condition())
        trained = {}
    elif line == "fine-tune":
        roles = Adapters(teacher, rank)
        trained = {"student": roles.parameters("student")}
    else:
        if line == "copies":
            own: Roles = Adapters(PipelineTeacher(copy.deepcopy(pipe)), rank)
            roles = Copies(teacher, own.student)
        else:
            own = roles = Adapters(teacher, rank) if line == "adapters" else Copies(teacher)
        method = DMD(roles, (1.0,), DMD.Options(guidance=1.0, fake_steps=1))
        trained = {"student": own.parameters("student"), "fake": roles.parameters("fake")}
    optimizers = {name: torch.optim.AdamW(own, lr=1e-4, fused=True) for name, own in trained.items()}
    for step in range(2 * len(trained)):
        if line == "fine-tune":
            take_turn(trained, "student")
            loss, name = denoising_loss(roles.student, drawn(step).noise, drawn(step), "output"), "student"
        else:
            turn = method.turn(step)
            take_turn(trained, turn.network)
            loss, name = method.loss(turn, drawn(step)).value, turn.network
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
    held = {} if line == "loaded" else roles.stored()
    parameters = {id(p): p.numel() for each in (net, *held.values()) for p in each.parameters()}
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"peak": kib / 1024, "parameters": sum(parameters.values()) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpoint", action="store_true", help="activations are computed again, not kept")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        print(json.dumps(peak_of(options.line, options.batch, options.rank, options.checkpoint)))
        return
    print(f"{'':<12}  {'parameters, M':>13}  {'peak, MiB':>9}  {'over loaded':>11}")
    loaded = 0.0
    for line in LINES:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--line", line]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        loaded = loaded or found["peak"]
        print(
            f"{line:<12}  {found['parameters']:>13.1f}  {found['peak']:>9.0f}  {found['peak'] - loaded:>11.0f}"
        )


if __name__ == "__main__":
    main()
