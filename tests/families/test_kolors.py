"""Kolors is SDXL with another text encoder, whose tokenizer needs sentencepiece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_kolors import tiny_kolors
from torch import Tensor

from stepdistill.diffusion.solvers import solve
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.families.watching import frames_of
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.pictures import draw_as_pipeline, strip
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher

pytest.importorskip("sentencepiece")
PROMPTS = ["a red heart", "blue fish"]


def test_it_is_called_as_its_pipeline_does_and_its_adapters_are_exported(tmp_path: Path) -> None:
    teacher = PipelineTeacher(tiny_kolors(tmp_path))
    pipe, said = teacher.pipe, list[tuple[Tensor, float, Tensor]]()
    hook = pipe.unet.register_forward_hook(
        lambda module, args, more, out: said.append((args[0], float(args[1]), out[0])), with_kwargs=True
    )
    call = {"prompt": PROMPTS, "num_inference_steps": 10, "output_type": "np", "return_dict": False}
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(**call, guidance_scale=5.0, generator=generator)[0]
    hook.remove()
    assert teacher.path.steps == 1100 and len(said) == 10  # type: ignore[attr-defined]
    assert teacher.null is not None
    both = teacher.null.repeat(2).join(teacher.codec.encode(PROMPTS))
    for x, index, out in said:
        ours = teacher.denoiser.raw(x, torch.full((4,), (index + 1) / 1100), both)
        assert (ours - out).abs().max() < 1e-5 and (ours[2] - ours[3]).abs().max() > 1e-3

    # Euler's steps in x / alpha are DDIM's.
    noise = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    times = [(index + 1) / 1100 for _, index, _ in said] + [0.0]
    alpha, sigma = teacher.path.alpha_sigma(torch.tensor(times[:1]))
    start = noise * float(pipe.scheduler.init_noise_sigma * alpha)
    assert sigma > 0.9
    cond = teacher.codec.encode(PROMPTS)
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=5.0), start, times, "ddim")
    assert (teacher.codec.to_frames(states) - frames_of(drawn)).abs().max() < 1e-3

    student = Adapters(teacher, 2, 6.0).student
    for key, value in student.net.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(1))
    sampler = on_stock_grid(Sampler((1.0, 0.5), True), teacher.path, pipe.scheduler)
    folder = tmp_path / "student"
    export(student, sampler, teacher, folder, PROMPTS, "", seeds=(0, 1))
    again = load_teacher(str(folder))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = again(**{**call, "num_inference_steps": 2}, guidance_scale=0.0, generator=generators)[0]
    pictures = draw_as_pipeline(student, sampler, teacher.codec, PROMPTS, (0, 1))
    assert (strip(frames_of(drawn)) - pictures).abs().max() < 1 / 255
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
