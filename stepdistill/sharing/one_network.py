"""The network of a one-step student, for programs without diffusers: noise and conditions in, clean latents out.

``torch.export`` writes a program that torch loads on Python and C++, ONNX one that onnxruntime runs. Each is run on
noise that was not used to make it, and compared with the network itself, before its description is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line
from stepdistill.export.schedulers import times_of
from stepdistill.export.verify import check_unaltered, student_folder
from stepdistill.families.condition import Condition
from stepdistill.families.size import Size
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.own_call import refuse_pictures
from stepdistill.networks.switched import SwitchedNetworks
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.files import folder_written_whole, sha256_of

ALLOWED = {"torch": 1e-6, "onnx": 1e-4}
"""How far a program's output may be from the network's, over the largest value of that."""
FILES = {"torch": "network.pt2", "onnx": "network.onnx"}
DESCRIPTION = "network.json"
MOST = 32
"""Samples of a batch; diffusers' UNets take another way from 64 on."""


class OneStep(nn.Module):
    """A student's network at its one time.

    Args:
        denoiser: the network on its path.
        time: at which it is called, in (0, 1].
        names: of its conditions, in the order in which they are given.
    """

    time: Tensor

    def __init__(self, denoiser: Denoiser, time: float, names: Sequence[str]) -> None:
        super().__init__()
        self.net, self._family, self._names = denoiser.net, denoiser.family, tuple(names)
        t = torch.tensor([time])
        self.register_buffer("time", denoiser.family.time(denoiser.path, t).clone(), persistent=False)
        # The clean state is linear in both, with numbers that only the time decides.
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        self._of_noise = float(denoiser.path.read(zero, denoiser.output, one, t).x0)
        self._of_output = float(denoiser.path.read(one, denoiser.output, zero, t).x0)

    def forward(self, noise: Tensor, *conditions: Tensor) -> Tensor:
        """Clean states [B, ...] from standard normal noise [B, ...] and conditions, each [B, ...]."""
        condition = Condition(dict(zip(self._names, conditions, strict=True)))
        output = self._family.call(self.net, noise, self.time.expand(noise.shape[0]), condition)
        return self._of_noise * noise + self._of_output * output


@dataclass(frozen=True)
class Inputs:
    """What a one-step network is given, as named tensors of a batch of two."""

    tensors: dict[str, Tensor]

    @property
    def in_order(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors.values())


def write_network(run: str | Path, formats: Sequence[str], folder: Path | None = None) -> Path:
    """Writes a one-step student's network, tested, with a description of its inputs and outputs.

    Args:
        run: a run folder, or the folder of its student.
        formats: what to write, of ``FILES``.
        folder: where to, replaced as a whole; None is ``network`` beside the student.

    Returns:
        The folder.

    Raises:
        UserError: the student takes several steps or has several networks, it cannot be exported so, or what was
            exported computes something else.
    """
    student = student_folder(run)
    network, inputs, told = one_step(student)
    folder = folder or student.parent / "network"
    if (
        folder.exists()
        and not (folder / DESCRIPTION).is_file()
        and (folder.is_file() or any(folder.iterdir()))
    ):
        raise UserError(
            f"{folder} is there, and holds no network of an earlier export: give another --output"
        )
    with folder_written_whole(folder) as place, torch.no_grad():
        written, program = {}, _traced(network, inputs)
        for kind in dict.fromkeys(formats):
            file = place / FILES[kind]
            run_it = _write_torch(program, file) if kind == "torch" else _write_onnx(program, inputs, file)
            written[kind] = {
                "file": file.name,
                "sha256": sha256_of(file),
                "difference": _difference(network, inputs, run_it, kind),
                "allowed": ALLOWED[kind],
            }
        (place / DESCRIPTION).write_text(json.dumps({**told, "formats": written}, indent=1) + "\n", "utf-8")
    return folder


def one_step(student: Path) -> tuple[OneStep, Inputs, dict[str, Any]]:
    """The network of a student's folder, inputs of the shapes that it takes, and what both are.

    Raises:
        UserError: the student takes several steps, or has several networks.
    """
    manifest = check_unaltered(student)
    call = manifest["call"]
    refuse_pictures(call, "--format")
    if (steps := int(call["num_inference_steps"])) != 1:
        raise UserError(
            f"{student} draws in {steps} steps, with a scheduler between them: --format is for students of one step"
        )
    pipe, _ = load_pipeline(student, "cpu")
    if type(pipe.components.get("unet") or pipe.components.get("transformer")).__name__ == "PhasedExperts":
        raise UserError(f"{student} is several networks, and --format writes one")
    told_size = [int(call[key]) for key in ("height", "width", "num_frames") if key in call]
    size = Size(*told_size) if told_size else None
    teacher = PipelineTeacher(pipe, size=size, guidance=float(call.get("guidance_scale", 1.0)))
    denoiser, family = teacher.denoiser, teacher.family
    if isinstance(denoiser.net, SwitchedNetworks):
        raise UserError(f"{student} is several networks, and --format writes one")
    (time,) = times_of(denoiser.path, pipe.scheduler, 1, family.passes)
    prompts = [str(each) for each in call.get("prompt") or call.get("class_labels") or ["", ""]]
    condition = teacher.codec.encode([prompts[0], prompts[-1]])
    if denoiser.guidance is not None:
        condition = condition.with_tensor("guidance", torch.full((2,), denoiser.guidance))
    tensors = {"noise": torch.randn(2, *denoiser.shape, generator=_seeded(0))}
    tensors |= {name: value.contiguous() for name, value in condition.tensors.items()}
    network = OneStep(denoiser, time, list(condition.tensors)).eval()
    vae = pipe.components.get("vae")
    told = {
        "pipeline": type(pipe).__name__,
        "network": type(denoiser.net).__name__,
        "time": time,
        "inputs": {
            name: {"shape": ["batch", *value.shape[1:]], "type": _kind(value)}
            for name, value in tensors.items()
        },
        "output": {"x0": {"shape": ["batch", *denoiser.shape], "type": "float32"}},
        "decode": None
        if vae is None
        else {key: vae.config.get(key) for key in ("scaling_factor", "shift_factor")},
        "student_files": {
            name: sha for name, sha in manifest["files"].items() if name.endswith(".safetensors")
        },
    }
    return network, Inputs(tensors), told


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _traced(network: OneStep, inputs: Inputs) -> Any:
    """The network as a program of 1 to ``MOST`` samples."""
    batch = torch.export.Dim("batch", min=1, max=MOST)
    first, *others = ({0: batch} for _ in inputs.in_order)
    shapes = (first, tuple(others)) if others else (first,)  # the conditions are one argument
    try:
        return torch.export.export(network, inputs.in_order, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise UserError(f"torch.export cannot write this network: {first_line(error)}") from error


def _write_torch(program: Any, file: Path) -> Callable[..., Tensor]:
    torch.export.save(program, file)
    module: Callable[..., Tensor] = program.module()
    return module


def _write_onnx(program: Any, inputs: Inputs, file: Path) -> Callable[..., Tensor]:
    import onnxruntime

    try:
        names: Any = {"input_names": list(inputs.tensors), "output_names": ["x0"]}
        made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        assert made is not None
        made.save(str(file))
    except Exception as error:
        raise UserError(f"torch.onnx cannot write this network: {first_line(error)}") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        named = {each.name: value.numpy() for each, value in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(["x0"], named)[0])

    return run


def _difference(network: OneStep, inputs: Inputs, run: Callable[..., Tensor], kind: str) -> float:
    """How far a program is from the network, on other noise and another batch than it was made with.

    Raises:
        UserError: too far.
    """
    rows = torch.tensor([1, 0, 1])
    _, *conditions = (value[rows] for value in inputs.in_order)
    noise = torch.randn(3, *inputs.tensors["noise"].shape[1:], generator=_seeded(1))
    expected, found = network(noise, *conditions), run(noise, *conditions)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= ALLOWED[kind]:
        raise UserError(
            f"{FILES[kind]} computes something else than the network: they differ by {difference:.3g} of its largest "
            f"value, and {ALLOWED[kind]:g} is allowed"
        )
    return difference
