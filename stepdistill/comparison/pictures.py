"""The same prompts drawn by every student that is compared, or what evaluations kept of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.evaluation.gallery import load_galleries
from stepdistill.export.verify import read_manifest
from stepdistill.families.watching import frames_of
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.networks.own_call import proof_calls, proof_prompts
from stepdistill.networks.pictures import strip, teacher_pictures, to_uint8
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pages.sheets import png_of_rows, read_sheet
from stepdistill.pictures.given import words_of
from stepdistill.recipes.choose import DEFAULT_TEACHER
from stepdistill.system.emoji import emoji_captions
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import Measured


def common_sheet(runs: Sequence[tuple[str, Path]]) -> bytes | None:
    """PNG of the pictures that the runs made at their ends: the teacher's rows once, then every student's.

    Args:
        runs: labels and run folders, of one teacher at one guidance.

    Returns:
        None where one of them has none, or where they are of other prompts or of another size.
    """
    teachers: dict[str, Tensor] = {}
    students: dict[str, Tensor] = {}
    seen = set()
    for label, folder in runs:
        file = RunFolder(folder).samples
        sheet = read_sheet(file.read_bytes()) if file.is_file() else None
        if sheet is None or not sheet.prompts:
            return None
        for row in sheet.rows:
            pixels = torch.stack([_tensor(picture) for picture in row.pictures])
            seen.add((sheet.prompts, pixels.shape))
            if row.label.startswith("student"):
                students[row.label.replace("student", label, 1)] = pixels
            else:
                teachers.setdefault(row.label, pixels)
    if len(seen) != 1:
        return None
    ((prompts, _),) = seen
    rows = sorted(teachers.items(), key=lambda row: _steps_of(row[0]), reverse=True)
    return png_of_rows([*rows, *students.items()], prompts)


def _steps_of(label: str) -> int:
    """Of ``teacher, 25 steps``."""
    return int(re.sub(r"\D", "", label) or 0)


def _tensor(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def draw_students(
    runs: Sequence[tuple[str, Path]], teacher: str, guidance: float, columns: int = 12
) -> bytes:
    """PNG of the same prompts and seeds: the teacher with 25 steps and with one, then every student.

    Args:
        runs: labels and run folders; each has student/.
        teacher: an embedded name, a folder or a hub id.
        guidance: of the teacher's pictures.
        columns: pictures in a row; the teacher's own captions, where it is embedded, or else the first student's
            verification prompts.

    Raises:
        UserError: a pipeline that does not load.
    """
    manifests = [read_manifest(folder / "student") for _, folder in runs]
    prompts: Any = proof_prompts(manifests[0], runs[0][1] / "student")
    seeds = manifests[0]["seeds"]
    if teacher == DEFAULT_TEACHER:
        captions = emoji_captions()
        prompts = [captions[i * len(captions) // columns] for i in range(columns)]
        seeds = list(range(columns))
    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = PipelineTeacher(load_teacher(teacher, torch.float32), device)
    for steps in (25, 1):
        texts = [str(prompt) for prompt in prompts or seeds]
        drawn = teacher_pictures(source, texts, seeds, steps, guidance)
        rows.append((f"teacher, {steps} step{'s' * (steps > 1)}", to_uint8(drawn)))
    for (label, folder), manifest in zip(runs, manifests, strict=True):
        call, parts = dict(manifest["call"]), list[Tensor]()
        if teacher == DEFAULT_TEACHER and "prompt" in call:
            call["prompt"] = prompts
        pipe, _ = load_pipeline(folder / "student", device)
        for some, of in proof_calls({**manifest, "call": call, "seeds": seeds}, folder / "student"):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in of]
            with torch.no_grad():
                drawn = pipe(**some, generator=generators, output_type="np", return_dict=False)[0]
            parts.append(strip(frames_of(drawn)))
        steps = call["num_inference_steps"]
        rows.append((f"{label}, {steps} step{'s' * (steps > 1)}", to_uint8(torch.cat(parts))))
    return png_of_rows(rows, words_of(str(prompt) for prompt in prompts or ()))


def kept_sheets(evaluations: Sequence[tuple[Measured, Path]], columns: int = 12) -> dict[str, bytes]:
    """PNGs of the first images that evaluations kept in their folders, a row a step count, a sheet a size.

    Args:
        evaluations: reports and their folders.
        columns: pictures in a row.

    Returns:
        Title -> PNG.

    Raises:
        UserError: what they kept is damaged.
    """
    by_size: dict[str, list[tuple[str, Tensor]]] = {}
    prompts: dict[str, list[tuple[str, ...]]] = {}
    for report, place in evaluations:
        for steps, gallery in load_galleries(place).items():
            if any(str(steps) in scores for scores in report.student.values()):
                label = f"{report.name}{f', {steps} step' if steps else ''}{'s' * (steps > 1)}"
                height, width = gallery.pixels.shape[-2:]
                title = f"The first images, {width} x {height}"
                by_size.setdefault(title, []).append((label, gallery.pixels[:columns]))
                prompts.setdefault(title, []).append((gallery.prompts or ())[:columns])
    return {
        title: png_of_rows(rows, prompts[title][0] if len(set(prompts[title])) == 1 else ())
        for title, rows in by_size.items()
    }
