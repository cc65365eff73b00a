"""Student -> a diffusers folder of stock classes, its step grid pinned, with what ``verify`` needs to prove it.

The exceptions are a student of several experts, whose network is of a class of ours that travels along, and one that
takes fresh noise on a flow path, whose scheduler is.

The folder holds the teacher's pipeline with the student's network and scheduler in place, ``verification/`` (prompts,
seeds, the trainer's own pictures, and the SHA-256 of every file), a model card, and for a LoRA student the adapter as
``pytorch_lora_weights.safetensors`` beside the merged weights.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.checkpoint import sha256_of
from stepdistill.ema import Ema
from stepdistill.errors import UserError
from stepdistill.experts import Experts, one_network
from stepdistill.families import Family
from stepdistill.path import FlowPath
from stepdistill.path import Path as NoisePath
from stepdistill.sampler import Sampler
from stepdistill.student import ADAPTER, Student, lora_layers, merged_state
from stepdistill.teacher import PipelineTeacher
from stepdistill.travelling import REASONS, travelling_code, travelling_module

VERIFICATION = "verification"
TOLERANCE = {"max": 4, "mean": 0.5}
"""Allowed difference between a student's pictures and the trainer's, in steps of 1/255."""


@torch.no_grad()
def draw_as_pipeline(
    student: Student, sampler: Sampler, teacher: PipelineTeacher, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """The trainer's pictures [B, 3, H, W] in [0, 1] from the very noises a pipeline draws, one generator a seed.

    Args:
        student: what is drawn with; LoRA is active.
        sampler: its steps.
        teacher: its encoder and decoder.
        prompts: B prompts.
        seeds: B seeds of CPU generators.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape = (1, *teacher.shape)

    def noise() -> Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.cat(rows).to(teacher.device)

    start, fresh = noise(), lambda call: noise()
    if isinstance(student.path, FlowPath):  # the noise of its travelling scheduler
        code = travelling_module("flow_consistency")
        keys = code.keys_of(start)
        fresh = lambda call: code.noise_after(keys, call, start)  # noqa: E731
    latents = sampler.draw(student, start, teacher.encode(list(prompts)), fresh)
    return teacher.to_images(latents)


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """The student with its averaged weights inside the ``with``, where there are any."""
    return ema.applied() if ema else nullcontext()


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded, on the CPU."""
    return (images * 255).round().to(torch.uint8).cpu()


def check_sampler(sampler: Sampler, path: NoisePath, family: Family) -> None:
    """Refuses a sampler with which the family's pipeline does not draw one picture from one seed.

    Raises:
        UserError: for fresh noise between steps on a table where the pipeline keeps its generator to itself.
    """
    own = isinstance(path, FlowPath)  # the scheduler that travels there has noise of its own
    if sampler.renoise and sampler.steps > 1 and not (own or family.passes_generator):
        raise UserError(
            f"a {sampler.steps}-step student that takes fresh noise between steps could not be reproduced from a seed: "
            f"{', '.join(family.pipelines)} hands its generator to no scheduler. Set student.times=[1.0], or the "
            "method's options.renoise=false where it has that option"
        )


def student_pipeline(student: Student, sampler: Sampler, teacher: PipelineTeacher) -> Any:
    """A stock diffusers pipeline that draws as the student does: the teacher's, with another network and scheduler."""
    import diffusers

    family = teacher.family
    check_sampler(sampler, student.path, family)
    folded = student.stock_net(sampler.gap) if student.two_times else student.net
    if isinstance(folded, Experts):
        bounds = family.timestep(student.path, torch.tensor(folded.bounds)).tolist()
        plain = [family.without_variance(_plain_network(expert)) for expert in folded.nets]
        net = one_network(plain, bounds)
    else:
        net = family.without_variance(_plain_network(folded))
    scheduler = sampler.scheduler(student.path, teacher.pipe.scheduler)
    other = family.student_pipeline(teacher.pipe)
    if other is not None:
        return getattr(diffusers, other)(**{family.denoiser: net, "scheduler": scheduler})
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(**{family.denoiser: net, "scheduler": scheduler})
    # from_pretrained gives diffusers' networks as float32 and transformers' as they were saved: of a teacher that was
    # handed in as bfloat16 it would make a pipeline of two types that cannot run.
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and component.dtype != torch.float32:
            pipe.register_modules(**{name: copy.deepcopy(component).float()})
    return pipe


def _plain_network(net: Any) -> nn.Module:
    """The student's network without adapters: its own where there are none, a merged copy otherwise."""
    if not lora_layers(net):
        return net  # type: ignore[no-any-return]
    plain = type(net).from_config(net.config)
    plain.load_state_dict(merged_state(net))
    return plain.to(next(net.parameters()).device).eval()  # type: ignore[no-any-return]


def _call(pipe: Any, sampler: Sampler, teacher: PipelineTeacher, prompts: Sequence[str]) -> dict[str, Any]:
    """The arguments with which a student's pipeline draws the prompts."""
    spelt = teacher.family.call_prompts(teacher.pipe, list(prompts))
    return {
        **teacher.family.call_arguments(type(pipe).__name__, spelt, sampler.guidance or 0.0),
        "num_inference_steps": sampler.steps,
        **sampler.call_arguments(),
    }


def check_export(student: Student, sampler: Sampler, teacher: PipelineTeacher, prompt: str) -> None:
    """Draws one picture with the pipeline that a student would be exported as, and compares it with the trainer's: what
    cannot be exported is told before a run, and not at its end.

    Raises:
        UserError: when it cannot be made, does not draw, or draws another picture.
    """
    try:
        pipe = student_pipeline(student, sampler, teacher)
        if "safety_checker" in pipe.components:
            pipe.register_modules(safety_checker=None)  # it blackens what it takes for unsafe
        generator = [torch.Generator("cpu").manual_seed(0)]
        call = _call(pipe, sampler, teacher, [prompt])
        drawn = torch.as_tensor(pipe(**call, generator=generator, output_type="np").images)
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"a student of this teacher could not be exported, so nothing was trained: {type(teacher.pipe).__name__} "
            f"does not draw with the student's network and scheduler ({type(error).__name__}: {first})"
        ) from error
    as_saved = copy.copy(teacher)
    as_saved.pipe = pipe
    own = draw_as_pipeline(student, sampler, as_saved, [prompt], [0]).permute(0, 2, 3, 1).cpu()
    difference = 255 * (drawn - own).abs()
    if difference.max() > TOLERANCE["max"] or difference.mean() > TOLERANCE["mean"]:
        raise UserError(
            f"a student of this teacher could not be exported, so nothing was trained: {type(pipe).__name__} draws "
            f"another picture than the trainer, by {difference.mean():.3g}/255 on average"
        )


def export(
    student: Student,
    sampler: Sampler,
    teacher: PipelineTeacher,
    folder: Path,
    prompts: Sequence[str],
    card: str,
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> None:
    """Writes the student's folder, replacing an earlier one only when the new one is complete.

    Args:
        student: with the weights that are to be exported.
        sampler: how it draws.
        teacher: whose pipeline it lives in.
        folder: where to; ends as a diffusers folder.
        prompts: as many as seeds, for the verification pictures.
        card: the model card, Markdown.
    """
    from PIL import Image

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe = student_pipeline(student, sampler, teacher)
    pipe.save_pretrained(partial)
    if isinstance(student.net, Experts):
        for i, net in enumerate(student.net.nets):
            _save_adapter(net, teacher, partial / f"expert-{i + 1}")
    else:
        _save_adapter(student.net, teacher, partial)
    (partial / "README.md").write_text(with_code_note(card, partial), encoding="utf-8")
    proof = partial / VERIFICATION
    proof.mkdir()
    as_saved = copy.copy(teacher)  # encodes and decodes in the float32 that was saved
    as_saved.pipe = pipe
    images = to_uint8(draw_as_pipeline(student, sampler, as_saved, prompts, seeds))
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(proof / f"{i}.png")
    manifest = {
        "call": _call(pipe, sampler, teacher, prompts),
        "seeds": list(seeds),
        "tolerance": TOLERANCE,
        "files": hashes(partial),
    }
    (proof / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


STOCK = "It is made of stock diffusers classes alone."
"""What a model card says of a student without code of its own."""


def with_code_note(card: str, folder: Path) -> str:
    """The model card of a student folder; where Python files travel in it, it says which, why, and how to load."""
    found = travelling_code(folder)
    if not found:
        return card
    names = ", ".join(f"`{path.relative_to(folder).as_posix()}`" for path in found)
    note = (
        f"**It carries code of its own, {names}, and loads with `trust_remote_code=True` alone**: "
        f"{'; '.join(REASONS[path.name] for path in found)}. The code imports torch and diffusers only; `stepdistill "
        "verify` checks that it is what stepdistill ships. All else is stock, and diffusers logs while loading that it "
        "expected a stock class."
    )
    plain = 'from_pretrained("path/to/this/folder")'
    return card.replace(plain, plain[:-1] + ", trust_remote_code=True)").replace(STOCK, note)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a student folder but its card and its manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: sha256_of(path)
        for name, path in names.items()
        if name not in ("README.md", f"{VERIFICATION}/manifest.json")
    }


def _save_adapter(net: nn.Module, teacher: PipelineTeacher, folder: Path) -> None:
    """The LoRA of a student as load_lora_weights takes it, where its pipeline class can load one."""
    if not lora_layers(net):
        return
    from peft import get_peft_model_state_dict

    writer = getattr(type(teacher.pipe), "save_lora_weights", None)
    if writer is None:
        return
    kind = teacher.family.denoiser
    state = get_peft_model_state_dict(net, adapter_name=ADAPTER)
    metadata = net.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr,index]
    writer(folder, **{f"{kind}_lora_layers": state, f"{kind}_lora_adapter_metadata": metadata})
