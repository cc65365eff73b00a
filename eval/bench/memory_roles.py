"""Peak memory of a DMD unit: who follows the student as a copy, as an adapter on the one network, and how all is held.

python eval/bench/memory_roles.py                   # a UNet of 61 M parameters, batch 4, rank 16
python eval/bench/memory_roles.py --batch 1 --checkpoint

Every line is two units of a process of its own on the CPU: the fake network's update and the student's, with AdamW. The
peak is that of the whole process; ``loaded`` has made the teacher and called it once without a graph, so the rest is
what training takes. ``fine-tune`` is an ordinary LoRA of the same network on noised samples: what adapters cannot get
below. ``copies`` is a LoRA student on a network of its own and a fake network that is trained whole. ``held`` are the
bytes of networks, masters and moments after the last unit, which a library's own memory is no part of. Lines that say
what holds a weight are trained under autocast to bfloat16, as ``train.weights`` and ``student.base`` are; those whose
library is not installed are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

LINES = {
    "loaded": {},
    "fine-tune": {},
    "adapters": {},
    "adapters on bf16": {"base": "bf16"},
    "adapters on int8": {"base": "int8"},
    "adapters on nf4": {"base": "nf4"},
    "copies": {},
    "all weights": {},
    "all in bf16": {"weights": "bf16"},
    "all with masters": {"weights": "master"},
    "all in bf16, adafactor": {"weights": "bf16", "optimizer": "adafactor"},
    "all in bf16, adamw8bit": {"weights": "bf16", "optimizer": "adamw8bit"},
}
NEEDS = {"int8": "torchao", "nf4": "bitsandbytes", "adamw8bit": "bitsandbytes"}


def peak_of(line: str, batch: int, rank: int, checkpoint: bool, tiny: bool) -> dict[str, float]:
    """Peak of this process in MiB after the line's work, and millions of parameters in memory."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from stepdistill.diffusion.draws import Draws
    from stepdistill.families.condition import Condition
    from stepdistill.losses.batch import Batch
    from stepdistill.losses.fake_score import denoising_loss
    from stepdistill.losses.objective import Objective
    from stepdistill.methods.dmd import DMD
    from stepdistill.networks.quantized import plain_tensors
    from stepdistill.networks.roles import Adapters, Copies, Roles
    from stepdistill.networks.teacher import PipelineTeacher
    from stepdistill.recipes.train_options import TrainOptions
    from stepdistill.training.arithmetic import autocast
    from stepdistill.training.parallel import take_turn
    from stepdistill.training.roles import held_for_adapters, teacher_type
    from stepdistill.training.weights import Weights, in_training

    torch.manual_seed(0)
    net: Any = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 96, 128) if tiny else (128, 256, 384, 512),
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

    way: dict[str, Any] = dict(LINES[line])
    base = way.pop("base", "auto")
    precision = "bf16" if way or base != "auto" else "float32"
    options = TrainOptions.model_validate({"precision": precision, "lr": 1e-4, **way})
    roles: Roles
    held: dict[str, Weights] = {}
    if line == "loaded":
        teacher.predict(drawn(0).noise, torch.full((batch,), 0.5), Condition())
    elif line == "fine-tune":
        roles = Adapters(teacher, rank)
        held = {"student": Weights("student", options, roles.parameters("student"))}
    else:
        if line == "copies":
            own: Roles = Adapters(PipelineTeacher(copy.deepcopy(pipe)), rank)
            roles = Copies(teacher, own.student)
        elif line.startswith("adapters"):
            # The unrounded state that a run keeps on the CPU for its export is let go here.
            held_for_adapters(teacher, options, base)
            own = roles = Adapters(teacher, rank)
        else:
            own = roles = Copies(teacher)
        method = DMD(roles, (1.0,), DMD.Options(guidance=1.0, fake_updates=1))
        if line == "copies":
            trained = {"student": own.parameters("student"), "fake": roles.parameters("fake")}
            held = {name: Weights(name, options, each) for name, each in trained.items()}
        else:
            teacher.compute_in(teacher_type(options)) if line.startswith("all") else None
            held = in_training(Objective(method), options)
        if base != "auto" or way:
            del pipe, net  # a run has no other than the teacher's, rounded
    every = {name: roles.parameters(name) for name in held}
    if line == "copies":
        every["student"] = own.parameters("student")
    for step in range(2 * len(held)):
        with autocast(precision, torch.device("cpu")):
            if line == "fine-tune":
                take_turn(every, "student")
                loss, name = (
                    denoising_loss(roles.student, drawn(step).noise, drawn(step), "output"),
                    "student",
                )
            else:
                turn = method.turn(step)
                take_turn(every, turn.network)
                loss, name = method.loss(turn, drawn(step)).value, turn.network
        loss.backward()
        held[name].step(step)
    networks = [net] if line == "loaded" else list(roles.stored().values())
    tensors = [v for each in networks for v in plain_tensors(each.state_dict()).values()]
    parameters = {id(p): p.numel() for each in networks for p in each.parameters()}
    for each in held.values():
        tensors += [p for group in each.optimizer.param_groups for p in group["params"]]
        tensors += [
            value
            for state in each.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {
        "peak": kib / 1024,
        "held": sum(storages.values()) / 2**20,
        "parameters": sum(parameters.values()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a network of 4 M parameters instead")
    parser.add_argument("--checkpoint", action="store_true", help="activations are computed again, not kept")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        print(
            json.dumps(peak_of(options.line, options.batch, options.rank, options.checkpoint, options.tiny))
        )
        return
    print(f"{'':<22}  {'parameters, M':>13}  {'held, MiB':>9}  {'peak, MiB':>9}  {'over loaded':>11}")
    loaded = 0.0
    for line, way in LINES.items():
        if any(importlib.util.find_spec(NEEDS[each]) is None for each in way.values() if each in NEEDS):
            continue
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--line", line]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        loaded = loaded or found["peak"]
        numbers = f"{found['parameters']:>13.1f}  {found['held']:>9.1f}  {found['peak']:>9.0f}"
        print(f"{line:<22}  {numbers}  {found['peak'] - loaded:>11.0f}")


if __name__ == "__main__":
    main()
