"""The LoRA of a student as files that others load."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.export.comfyui import StudentFile, check_comfyui, workflow, write_workflow
from stepdistill.export.experts import adapter_files
from stepdistill.export.kohya import kohya_state
from stepdistill.networks.adapter_teacher import note_teacher
from stepdistill.networks.pipeline_files import LORA
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.sections import ExportOptions
from stepdistill.system.log import say

KOHYA = LORA.replace(".", "_kohya.")


def no_adapter_file(teacher: PipelineTeacher, student: Student | None = None) -> str | None:
    """Why a LoRA student has no adapter that its pipeline loads, as the end of a sentence; None where it has one, as
    far as is known without the student."""
    kind, network = type(teacher.pipe), teacher.family.network
    writer, reader = (getattr(kind, f"{verb}_lora_weights", None) for verb in ("save", "load"))
    if writer is None or reader is None:
        return f"{kind.__name__} has no load_lora_weights"
    if f"{network}_lora_layers" not in inspect.signature(writer).parameters:
        return f"{kind.__name__}.save_lora_weights takes no layers of its {network}"
    net = getattr(teacher.pipe, network)
    if not hasattr(net, "load_lora_adapter"):  # ModelScope's, whose pipeline calls it all the same
        return f"{type(net).__name__} has no load_lora_adapter"
    if student is not None and student.two_times:
        return "its network was given a second time, which is no adapter"
    return None


def check_options(
    options: ExportOptions,
    teacher: PipelineTeacher,
    *,
    lora: bool,
    named: bool,
    student: Student | None = None,
) -> str | None:
    """Refuses what cannot be exported so.

    Args:
        options: of the recipe.
        teacher: whose student it is.
        lora: whether that is an adapter.
        student: as it is trained; None before it is made, when less is known.
        named: whether the teacher is a folder or a Hub name, which others find again.

    Returns:
        What is to be said of an adapter that is left out; None where nothing is.

    Raises:
        UserError: saying what can be.
    """
    if not lora:
        why = "its student trains weights of its own, no adapter"
    else:
        why = no_adapter_file(teacher, student) or ""
    if options.what == "adapter":
        several = student is not None and bool(student.experts)
        if not why and (several or len(teacher.family.stretches(teacher.pipe)) > 1):
            why = "its student is several networks, each with an adapter of its own"
        if not why and not named:
            why = "the teacher is an object, which nobody else finds"
        if why:
            raise UserError(f"export.what is adapter, but {why}: set export.what=merged")
    if options.kohya:
        network = type(getattr(teacher.pipe, teacher.family.network)).__name__
        if not why and options.what == "merged":
            why = "export.what is merged, which writes no adapter"
        elif not why and network != "UNet2DConditionModel":
            why = f"its names are for UNets, and this is a {network}"
        if why:
            raise UserError(f"export.kohya is true, but {why}: set it to false")
    if options.comfyui:
        net = getattr(teacher.pipe, teacher.family.network)
        if (odd := check_comfyui(type(teacher.pipe).__name__, net.config)) is not None:
            raise UserError(f"export.comfyui is true, but {odd}: set it to false")
    if lora and why and options.what == "both":
        return f"the student is exported with its adapter in its weights alone: {why}"
    return None


def save_adapters(student: Student, teacher: PipelineTeacher, folder: Path) -> None:
    """Writes the LoRA of a student, or of each of its experts, as ``load_lora_weights`` of its pipeline takes it: with
    rank, alpha and layers as metadata."""
    writer: Any = type(teacher.pipe)
    kind = teacher.family.network
    for name, (config, state) in adapter_files(student).items():
        layers = {f"{kind}_lora_layers": state, f"{kind}_lora_adapter_metadata": config}
        writer.save_lora_weights(folder / name, **layers)


def save_kohya(student: Student, folder: Path) -> None:
    """Writes the LoRA of a student once more, under the names of kohya's scripts, see ``kohya.py``."""
    for name, (config, state) in adapter_files(student).items():
        rank, alpha, net = int(config["r"]), float(config["lora_alpha"]), cast(Any, student.net)
        told = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
        }
        save_file(kohya_state(state, alpha, net.config), folder / name / KOHYA, metadata=told)


def save_alone(student: Student, teacher: PipelineTeacher, scheduler: Any, source: str, folder: Path) -> None:
    """Writes the folder of an adapter alone: its file, the scheduler, and of what teacher it is.

    Args:
        student: a LoRA.
        teacher: of whose pipeline.
        scheduler: with which it draws.
        source: the teacher's folder or Hub name.
        folder: where to.
    """
    save_adapters(student, teacher, folder)
    scheduler.save_pretrained(folder / "scheduler")
    note_teacher(source, type(teacher.pipe).__name__, folder)


def called_with(sampler: Sampler, student: Student) -> Sampler:
    """The sampler of an adapter's call: the teacher's network, which has guidance as an input, still takes it."""
    return sampler if student.guidance is None else replace(sampler, guidance=student.guidance)


def save_comfyui(
    student: Student,
    sampler: Sampler,
    teacher: PipelineTeacher,
    scheduler: Any,
    source: Any,
    prompt: str,
    folder: Path,
) -> None:
    """Writes a workflow for ComfyUI beside a student's files, and a UNet's adapter under kohya's names, which ComfyUI
    reads; where ComfyUI cannot draw so, a line says why and nothing is written.

    Args:
        student: an adapter whose file is in the folder, or the network in the folder.
        sampler: how it draws.
        teacher: of whose pipeline.
        scheduler: with which it draws.
        source: the teacher's folder, Hub name or pipeline.
        prompt: the first to draw.
        folder: of the student.
    """
    pipeline, network = type(teacher.pipe).__name__, teacher.family.network
    file, guidance = StudentFile(f"{network}/diffusion_pytorch_model.safetensors", None), sampler.guidance
    if (folder / LORA).is_file():
        ((config, _),) = adapter_files(student).values()
        file, guidance = StudentFile(LORA, float(config["lora_alpha"] / config["r"])), student.guidance
        if network == "unet":  # its file of these names says alpha itself
            save_kohya(student, folder)
            file = StudentFile(KOHYA, 1.0)
    try:
        if not (folder / file.file).is_file():
            raise UserError(
                "the student's network is in several files; set export.max_shard_size to more than it has"
            )
        nodes = workflow(
            pipeline=pipeline,
            student=file,
            teacher=Path(source).name if isinstance(source, str | Path) else "teacher",
            sampler=sampler,
            path=student.path,
            prediction_type=str(scheduler.config.get("prediction_type", "epsilon")),
            prompt=prompt,
            width=teacher.codec.size.width,
            height=teacher.codec.size.height,
            guidance=guidance,
        )
    except UserError as error:
        say(f"export.comfyui: no workflow is written: {error}")
        return
    write_workflow(folder, nodes)
