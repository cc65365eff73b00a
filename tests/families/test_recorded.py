"""A family recorded from a draw of a pipeline says what the family that was written for it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import FLOW, GUIDED, PIPELINES, SIZES, WITH_VAE, tiny_prompts

from stepdistill.families._recording import record
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_recorded_family_of_a_known_pipeline_is_the_known_one(name: str, teacher_of: Teachers) -> None:
    """Noise, time, sign, layout, conditions, null, size, pictures, and what its scheduler is passed."""
    teacher = teacher_of(name)
    pipe, known = teacher.pipe, teacher.family
    path, output = path_of(pipe.scheduler)
    ours = record(pipe, path, output, SIZES.get(name), guidance=1.0)
    assert ours.network == known.network and ours.passes == (known.passes - {"generator"} | ours.passes)
    assert ("generator" in ours.passes) >= ("generator" in known.passes)
    assert ours.default_size(pipe) == teacher.size and ours.video == known.video
    assert ours.state_shape(pipe, teacher.size) == teacher.codec.shape
    if name in FLOW:
        assert ours.shift(pipe, teacher.codec.shape) == pytest.approx(
            known.shift(pipe, teacher.codec.shape), rel=1e-6
        )

    recorded = Denoiser(teacher.denoiser.net, path, output, ours, teacher.codec.shape)
    prompts = tiny_prompts(name, 3)
    conditions = teacher.codec.encode(prompts), ours.encode(pipe, prompts, teacher.size)
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(3, *teacher.codec.shape, generator=generator)
    t = torch.tensor([0.9, 0.501, 0.03])
    assert torch.equal(ours.pack(x_t), known.pack(x_t))
    assert torch.equal(ours.unpack(ours.pack(x_t), teacher.codec.shape), x_t)
    assert torch.allclose(ours.time(path, t), known.time(path, t), rtol=1e-6)
    wanted = teacher.denoiser.raw(x_t, t, conditions[0])
    assert (recorded.raw(x_t, t, conditions[1]) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (ours.null(pipe, teacher.size) is not None) == (name in (*GUIDED, "schnell"))
    if name in GUIDED:
        nulls = teacher.null, ours.null(pipe, teacher.size)
        assert nulls[0] is not None and nulls[1] is not None
        wanted = teacher.denoiser.raw(x_t, t, nulls[0].repeat(3))
        assert (recorded.raw(x_t, t, nulls[1].repeat(3)) - wanted).abs().max() < 2e-5 * wanted.abs().max()

    drawn = ours.drawn_frames(pipe, x_t)
    assert (drawn - teacher.codec.to_frames(x_t)).abs().max() < 1e-5
    assert ours.differentiable == (name in WITH_VAE)
