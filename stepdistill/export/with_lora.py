"""Control transfer: a LoRA that was trained on the teacher, in the weights of its student.

Sliders, styles and concepts of a base model act on a student that was distilled from it as they are (Gandikota and Bau
2025, arXiv 2503.10637); what scale suits the student is to be tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line
from stepdistill.export.composed import write_composed
from stepdistill.export.verify import read_manifest, student_folder
from stepdistill.families import known_family
from stepdistill.families.watching import frames_of
from stepdistill.networks.find import find_lora
from stepdistill.networks.loading import load_pipeline, with_merged_adapters
from stepdistill.networks.own_call import proof_call, proof_calls
from stepdistill.networks.pictures import strip
from stepdistill.system.float32 import full_float32

NAME = "added"


def lora_file(lora: str) -> Path:
    """The file of a LoRA that a name means.

    Raises:
        UserError: it is none.
    """
    found = find_lora(lora)
    if found is None:
        raise UserError(f"--add-lora {lora} is no LoRA: give a .safetensors file, or a folder that holds one")
    return found


def write_with_lora(student: str | Path, lora: str, scale: float, folder: Path, device: Any = None) -> None:
    """Writes a student's folder once more, with a LoRA in its weights.

    Args:
        student: its folder, or its run's.
        lora: the file of the LoRA.
        scale: how strongly; 0 gives the student's weights, bit for bit.
        folder: where to.
        device: None takes a GPU where there is one.

    Raises:
        UserError: the LoRA is none, or is for another network.
    """
    source, file = student_folder(student), lora_file(lora)
    pipe = with_merged_adapters(load_pipeline(source, device)[0])
    manifest, kind = read_manifest(source), type(pipe).__name__
    family = known_family(kind)
    if family is None or not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"--add-lora: diffusers loads no LoRA into a {kind}")
    before = getattr(pipe, family.network)
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=NAME)
        pipe.set_adapters([NAME], adapter_weights=[scale])
    except (ValueError, KeyError, AttributeError, RuntimeError, OSError) as error:
        raise UserError(
            f"--add-lora: {file} does not fit this student's {type(before).__name__}: {first_line(error)}"
        ) from error
    merged = with_merged_adapters(pipe)
    own: nn.Module = getattr(merged, family.network)
    if own is before:
        raise UserError(f"--add-lora: {file} has nothing for this student's {type(before).__name__}")

    @full_float32()
    def draw() -> Tensor:
        drawn = []
        for call, seeds in proof_calls(manifest, source):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            drawn.append(
                strip(frames_of(pipe(**call, generator=generators, output_type="np", return_dict=False)[0]))
            )
        return torch.cat(drawn)

    note = f"\nThe LoRA `{file.name}` is in its weights at scale {scale:g}.\n"
    card = (source / "README.md").read_text("utf-8") + note
    write_composed(
        folder, merged, family.network, source, proof_call(manifest, source), manifest["seeds"], draw, card,
        alone=bool(manifest.get("alone")),
    )  # fmt: skip
