"""Student -> a diffusers folder of stock classes, its step grid pinned, with what ``verify`` needs to prove it.

The exceptions are a student of several experts, whose network is of a class of ours that travels along, and one that
takes fresh noise on a flow path, whose scheduler is.

The folder holds the teacher's pipeline with the student's network and scheduler in place, ``verification/`` (prompts,
seeds, the trainer's own pictures, and the SHA-256 of every file), a model card, and for a LoRA student without a second
time the adapter as ``pytorch_lora_weights.safetensors`` beside the merged weights, or that and the scheduler alone. The
network is saved in the types and shards of the teacher's, and its pictures are drawn with the weights as they are
saved; all other parts are the teacher's own files.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import UserError, first_line
from stepdistill.export.adapters import (
    called_with,
    check_options,
    no_adapter_file,
    save_adapters,
    save_alone,
    save_comfyui,
    save_kohya,
)
from stepdistill.export.card import for_folder
from stepdistill.export.checks import grid_check
from stepdistill.export.experts import one_network, stock_networks
from stepdistill.export.original import Original, held_in, in_float32, round_to
from stepdistill.export.schedulers import check_sampler, stock_scheduler
from stepdistill.export.shared import carry_terms, take_out_folders
from stepdistill.families._guiders import is_guider
from stepdistill.families.watching import frames_of, watch
from stepdistill.networks.codec import Codec
from stepdistill.networks.concept import Concept
from stepdistill.networks.own_call import VERIFICATION, kept_call
from stepdistill.networks.pictures import draw_as_pipeline, strip, to_uint8
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.streamed import streamed
from stepdistill.networks.student import Student
from stepdistill.networks.switched import network_of, networks_in
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.networks.tiles import KEY, tiles_of
from stepdistill.pictures.given import any_named
from stepdistill.recipes.sections import ExportOptions
from stepdistill.system.files import folder_written_whole, sha256_of
from stepdistill.system.float32 import full_float32

TOLERANCE = {"max": 4, "mean": 0.5}
"""Allowed difference between a student's pictures and the trainer's, in steps of 1/255."""

DEFAULT = ExportOptions()


def student_pipeline(student: Student, sampler: Sampler, teacher: PipelineTeacher) -> Any:
    """A stock diffusers pipeline that draws as the student does: the teacher's, with another network and scheduler."""
    import diffusers

    family = teacher.family
    check_sampler(sampler, student.path, family)
    networks, starts = stock_networks(student, sampler, lambda: teacher.codec.encode(["0"]))
    scheduler = stock_scheduler(sampler, student.path, teacher.pipe.scheduler, family.passes)
    other = family.student_pipeline(teacher.pipe, networks[0])
    if other is not None:
        (net,) = networks if len(networks) == 1 else [one_network(networks, starts[:-1])]
        kind = getattr(diffusers, other)
        parts = {**teacher.pipe.components, family.network: net, "scheduler": scheduler}
        takes = inspect.signature(kind.__init__).parameters
        return kind(**{name: part for name, part in parts.items() if name in takes})
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(scheduler=scheduler)
    if not family.put(pipe, networks, starts):
        family.put(pipe, [one_network(networks, starts[:-1])], [0.0])
    return pipe


def pipeline_call(pipeline: str, sampler: Sampler, codec: Codec, prompts: Sequence[str]) -> dict[str, Any]:
    """The arguments with which a student's pipeline, of the class ``pipeline``, draws the prompts."""
    spelt = codec.family.call_prompts(codec.pipe, list(prompts))
    return {
        **codec.family.call_arguments(pipeline, spelt, sampler.guidance, codec.told_size),
        **codec.family.own_arguments(codec.pipe),
        "num_inference_steps": sampler.steps,
        **codec.family.grid_arguments(sampler.steps),
        **sampler.call_arguments(),
    }


def check_export(student: Student, sampler: Sampler, teacher: PipelineTeacher, prompt: str) -> None:
    """Draws one picture with the pipeline that a student would be exported as, and compares it with the trainer's: what
    cannot be exported is told before a run, and not at its end.

    Raises:
        UserError: when it cannot be made, does not draw, asks its network for other times, or draws another picture.
    """
    try:
        student = student.exported()
        pipe = student_pipeline(student, sampler, teacher)
        if "safety_checker" in pipe.components:
            pipe.register_modules(safety_checker=None)  # it blackens what it takes for unsafe
        generator = [torch.Generator("cpu").manual_seed(0)]
        call = pipeline_call(type(pipe).__name__, sampler, teacher.codec, [prompt])
        with full_float32(), in_float32(pipe), _drawable(student, pipe, teacher):
            seen = watch(pipe, {**call, "generator": generator, "output_type": "np"})
        grid_check(seen, sampler, student.path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"a student of this teacher could not be exported, so nothing was trained: {type(teacher.pipe).__name__} "
            f"does not draw with the student's network and scheduler ({first_line(error)})"
        ) from error
    with in_float32(pipe), _drawable(student, pipe, teacher):
        own = draw_as_pipeline(student, sampler, replace(teacher.codec, pipe=pipe), [prompt], [0]).cpu()
    difference = 255 * (strip(frames_of(seen.drawn)) - own).abs()
    if difference.max() > TOLERANCE["max"] or difference.mean() > TOLERANCE["mean"]:
        raise UserError(
            f"a student of this teacher could not be exported, so nothing was trained: {type(pipe).__name__} draws "
            f"another picture than the trainer, by {difference.mean():.3g}/255 on average"
        )


def _drawable(student: Student, pipe: Any, teacher: PipelineTeacher) -> AbstractContextManager[None]:
    """Inside the ``with`` a student that :meth:`Student.exported` gave draws on the teacher's device, and its pipeline
    does."""
    names = {teacher.family.network, *teacher.family.stretches(teacher.pipe)}
    own = [part for name, part in pipe.components.items() if name in names and part is not None]
    drawn = [net for each in student.experts or (student,) for net in networks_in(each.net)]
    return streamed([*own, *drawn], teacher.device)


def export(
    student: Student,
    sampler: Sampler,
    teacher: PipelineTeacher,
    folder: Path,
    prompts: Sequence[str],
    card: str,
    seeds: Sequence[int] = (0, 1, 2, 3),
    *,
    source: Any = None,
    options: ExportOptions = DEFAULT,
    concept: Concept | None = None,
) -> None:
    """Writes the student's folder, replacing an earlier one only when the new one is complete. In memory it makes at
    most one network: the student with its adapter merged, or its weights rounded.

    Args:
        student: with the weights that are to be exported.
        sampler: how it draws.
        teacher: whose pipeline it lives in.
        folder: where to; ends as a diffusers folder.
        prompts: as many as seeds, for the verification pictures.
        card: the model card, Markdown.
        source: the teacher as it was given: a folder, a Hub name, or a pipeline; None is that of ``teacher``.
        options: what is written.
        concept: the word that the teacher's pipeline was taught; its rows are written into it.

    Raises:
        UserError: where it cannot be written so.
    """
    from PIL import Image

    source = teacher.pipe if source is None else source
    lora, named = student.adapter is not None, isinstance(source, str | Path)
    check_options(options, teacher, lora=lora, named=named, student=student)
    alone = options.what == "adapter"
    with folder_written_whole(folder) as place:
        if alone:
            whole, pipe = student.exported(), teacher.pipe
            check_sampler(sampler, student.path, teacher.family)
            scheduler = stock_scheduler(sampler, student.path, teacher.pipe.scheduler, teacher.family.passes)
            save_alone(student, teacher, scheduler, str(source), place)
        else:
            original = Original(source, concept.parts if concept else ())
            if concept:
                concept.settle(lambda name, row: row.to(original.types(name).most).to(row))
            whole, pipe = _save_pipeline(student, sampler, teacher, original, options, place)
        if options.what == "both" and no_adapter_file(teacher, student) is None:
            save_adapters(student, teacher, place)
        if options.kohya:
            save_kohya(student, place)
        if options.comfyui:
            used = scheduler if alone else pipe.scheduler
            save_comfyui(student, sampler, teacher, used, source, prompts[0], place)
        carry_terms(source, place)
        take_out_folders(place)
        proof = place / VERIFICATION
        proof.mkdir()
        codec = replace(teacher.codec, pipe=pipe)
        stays = frozenset(teacher.family.stretches(pipe))
        with in_float32(pipe, but=stays), _drawable(whole, pipe, teacher):
            images = to_uint8(draw_as_pipeline(whole, sampler, codec, prompts, seeds))
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(proof / f"{i}.png")
        asked = called_with(sampler, student) if alone else sampler
        manifest = {
            "call": kept_call(pipeline_call(type(pipe).__name__, asked, teacher.codec, prompts), place),
            "seeds": list(seeds),
            "step_counts": sorted({sampler.steps, *sampler.step_counts}),
            "alone": teacher.family.alone or any_named(prompts),
            "tolerance": TOLERANCE,
            "files": hashes(place),
        }
        if tiles := tiles_of(pipe.components.get("vae")):
            manifest[KEY] = tiles
        (proof / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (place / "README.md").write_text(for_folder(card, place), encoding="utf-8")


def _save_pipeline(
    student: Student,
    sampler: Sampler,
    teacher: PipelineTeacher,
    original: Original,
    options: ExportOptions,
    place: Path,
) -> tuple[Student, Any]:
    """Writes the student's pipeline; the student with the weights that were saved, in float32, and its pipeline."""
    networks = {teacher.family.network, *teacher.family.stretches(teacher.pipe)}
    types = original.types(teacher.family.network)
    whole = student.exported((lambda net: round_to(net, types)) if types.rounds else None)
    pipe = student_pipeline(whole, sampler, teacher)
    for name, part in pipe.components.items():
        if part is None:
            continue
        if name in networks:
            size = options.max_shard_size or original.shard_size(name)
            with held_in(part, types) if types.rounds else nullcontext():
                part.save_pretrained(place / name, max_shard_size=size)
        elif name == "scheduler" or is_guider(part):
            part.save_pretrained(place / name)
        else:
            original.save(name, part, place / name)
    pipe.save_config(place)
    if (
        types.rounds and whole.two_times
    ):  # folding came after rounding, so what was saved is rounded once more
        net = network_of(teacher.family, pipe)
        whole = Student(net, whole.path, whole.output, whole.family, whole.shape)
    return whole, pipe


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a student folder but its card and its manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: sha256_of(path)
        for name, path in names.items()
        if name not in ("README.md", f"{VERIFICATION}/manifest.json")
    }
