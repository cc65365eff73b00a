"""Writes docs/reference/families.md, what each family supports, from tiny pipelines: python train/families.py

Every cell is tried on the code: adapters and a second time are added, schedulers chosen, derivatives taken. What is
refused stands there with the reason that a run would be given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from stepdistill.errors import UserError
from stepdistill.export.adapters import no_adapter_file
from stepdistill.export.schedulers import check_sampler, stock_scheduler
from stepdistill.losses.gan import FeatureGan
from stepdistill.networks.derivative import directional_derivative
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.student import Student
from stepdistill.networks.switched import networks_in
from stepdistill.networks.teacher import PipelineTeacher

TOYS = Path(__file__).resolve().parents[1] / "tests" / "toys"
FILE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "families.md"
HEADS = (
    "family, pipelines",
    "guidance",
    "LoRA",
    "second time (flow maps)",
    "features for a GAN",
    "scheduler of 1 and 4 steps",
    "with fresh noise between 4",
    "exact derivatives",
)
TEXT = """# What each family supports

Written by `python train/families.py`, which tries every cell on a tiny pipeline of the family's classes; a test says
whether it is up to date. Where something is impossible, the reason stands in its place. A scheduler with a star is one
of `pipelines/` and travels with the student.

{table}

Any other pipeline that draws from prompts alone is recorded. `python tests/recorded_classes.py` distils some, exports
each and draws with plain diffusers again:

- images: Bria, CogView 3 Plus, the first stage of DeepFloyd IF, ERNIE-Image, FIBO 1 and 2, HunyuanImage 2.1,
  Kandinsky 3 and 5, Krea 2, LCM, LDM (no fresh noise between steps), LongCat-Image, Lumina, NucleusMoE-Image,
  Ovis-Image, Qwen-Image 2.1, Z-Image Omni, and the classes with perturbed or self-attention guidance, which is left
  out;
- videos: Allegro (its VAE decodes in tiles alone: call `pipe.vae.enable_tiling()`), AnimateDiff (SD and SDXL),
  EasyAnimate, HunyuanVideo 1.5, Latte, LTX 0.9.5 and later, Mochi (two steps and more: its call divides by zero in
  one), Motif Video, SANA-Video.

LTX-2 has a family, and is distilled with its sound: a state is both. It has no features for a GAN and takes no videos.

FLUX Kontext, Qwen-Image-Edit and Wan from a picture have families too, and Flux.2 draws with a picture and without:
[how prompts name one](../guides/data.md#pictures-to-draw-from). Pipelines that take several pictures for one prompt are
given one.

What draws in several stages, from pictures in other ways, or frame by frame at times of their own is refused, and told
why. What is recorded has LoRA, merged and as a file where its class takes one, a second time where its network embeds
the timestep with a bias, and a scheduler by what its call passes. It has no features for a GAN, and takes images where
its VAE alone says how.
"""


def tried(ask: Callable[[], str]) -> str:
    """The answer, or "no" with the reason of the refusal."""
    try:
        return ask()
    except UserError as error:
        return f"no: {_reason(str(error))}"


def _reason(text: str) -> str:
    """The part of a refusal that says why, without what it is about and what to do."""
    return text.rpartition("but a ")[2].partition(": ")[0] if "but a " in text else text.partition(": ")[0]


def cells(teacher: PipelineTeacher, prompts: list[str]) -> tuple[str, ...]:
    """A row of the table but for its first cell."""
    net, path, family = teacher.denoiser, teacher.path, teacher.family
    stock = teacher.pipe.scheduler

    def guidance() -> str:
        if net.guidance is not None:
            return "an input of the network, folded into the student"
        if teacher.null is None:
            return "none"
        return "extrapolated" + ", at the prompt's own length" * family.keeps_length

    def lora() -> str:
        if not lora_layers(Adapters(teacher, 2).student.net):
            return "no: no layers"
        loads = no_adapter_file(teacher) is None
        return "adapter and merged" if loads else "merged alone: its pipeline loads no adapter"

    def second_time() -> str:
        Student.from_teacher(teacher).add_second_time()
        return "yes"

    def features() -> str:
        eye = networks_in(net.net)[0]  # of several, each has its own
        FeatureGan(net)
        found = family.features_of(eye)
        name = next(name for name, module in eye.named_modules() if module is found)
        return f"`{re.sub('[0-9]+', 'i', name)}`"

    def scheduler(steps: int, renoise: bool) -> str:
        sampler = Sampler(schedule_times(path, steps), renoise)
        check_sampler(sampler, path, family)
        kind = type(stock_scheduler(sampler, path, stock, family.passes))
        return kind.__name__.removesuffix("Scheduler") + "\\*" * (not kind.__module__.startswith("diffusers"))

    def both() -> str:
        one, four = (scheduler(steps, False) for steps in (1, 4))
        return one if one == four else f"{one}, {four}"

    def derivative() -> str:
        x = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
        cond, t = teacher.codec.encode(prompts[:1]), torch.full((1,), 0.5)
        net.raw(x, torch.ones(1), cond)  # what a network keeps of its first call, it keeps as of any
        found = directional_derivative(lambda x, t: net.raw(x, t, cond), (x, t), (x, torch.ones(1)))
        return "yes" if bool(found.isfinite().all()) else "no: not finite"

    return tuple(
        tried(ask)
        for ask in (guidance, lora, second_time, features, both, lambda: scheduler(4, True), derivative)
    )


def text_of(teacher_of: Callable[[str], PipelineTeacher]) -> str:
    """What the file is to hold.

    Args:
        teacher_of: the tiny teacher of a name of ``tiny.PIPELINES``.
    """
    import tiny
    import tiny_from_picture
    from tiny_hidream import tiny_hidream

    teachers = [(teacher_of(name), tiny.tiny_prompts(name, 1)) for name in tiny.PIPELINES]
    teachers.append((PipelineTeacher(tiny_hidream()), ["a red heart"]))
    for name, size in tiny_from_picture.SIZES.items():
        teachers.append((PipelineTeacher(tiny_from_picture.tiny_from_picture(name), size=size), [""]))
    rows: dict[tuple[str, ...], None] = {}
    for teacher, prompts in teachers:
        first = f"{teacher.family.name}: {', '.join(teacher.family.pipelines)}"
        rows[first, *cells(teacher, prompts)] = None
    lines = [HEADS, ("---",) * len(HEADS), *sorted(rows)]
    return TEXT.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    sys.path.insert(0, str(TOYS))
    from tiny import tiny_teacher

    FILE.write_text(text_of(tiny_teacher), encoding="utf-8")
    print(FILE)
