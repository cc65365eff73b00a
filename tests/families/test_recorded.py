"""A family recorded from a draw of a pipeline says what the family that was written for it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import FLOW, GUIDED, PIPELINES, WITH_VAE, tiny_pipeline, tiny_prompts

from stepdistill.families._recording import record
from stepdistill.families.size import Size
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_recorded_family_of_a_known_pipeline_is_the_known_one(name: str, teacher_of: Teachers) -> None:
    """Layout, time, sign, conditions, null, size, pictures, and what its scheduler is passed."""
    small = name == "sana"  # its own size is a thousand pixels
    teacher = PipelineTeacher(tiny_pipeline(name), size=Size(64, 32)) if small else teacher_of(name)
    pipe, known, size = teacher.pipe, teacher.family, teacher.size
    path, output = path_of(pipe.scheduler)
    ours = record(pipe, path, output, size, guidance=1.0)
    assert ours.network == known.network and ours.passes >= known.passes
    assert ours.passes - known.passes <= {"generator"}  # a family may keep quiet about that
    assert ours.default_size(pipe) == size and ours.video == known.video
    assert ours.keeps_length == known.keeps_length and ours.remark.count("\n") == 0
    if name in FLOW:
        tokens = known.tokens(teacher.denoiser.net, teacher.codec.shape)
        assert ours.shift(pipe, tokens) == pytest.approx(known.shift(pipe, tokens), rel=1e-6)

    state = ours.state_shape(pipe, size)  # the known one may leave out an axis of one frame
    recorded = Denoiser(teacher.denoiser.net, path, output, ours, state)
    x_t = torch.randn(3, *teacher.codec.shape, generator=torch.Generator().manual_seed(5))
    own, t = x_t.reshape(3, *state), torch.tensor([0.9, 0.501, 0.03])
    assert torch.equal(ours.pack(own).flatten(1), known.pack(x_t).flatten(1))
    assert torch.equal(ours.unpack(ours.pack(own), state), own)
    prompts = tiny_prompts(name, 3)
    conditions = [(teacher.codec.encode(prompts), ours.encode(pipe, prompts, size))]
    null = ours.null(pipe, size)
    assert (null is not None) == (name in (*GUIDED, "schnell"))
    if null is not None and teacher.null is not None:
        conditions.append((teacher.null.repeat(3), null.repeat(3)))
    for told, heard in conditions:
        wanted = teacher.denoiser.raw(x_t, t, told).reshape(3, *state)
        assert (recorded.raw(own, t, heard) - wanted).abs().max() < 2e-5 * wanted.abs().max()

    drawn = ours.drawn_frames(pipe, own)
    assert (drawn - teacher.codec.to_frames(x_t)).abs().max() < 1e-5
    assert ours.differentiable == (
        name in WITH_VAE and name not in ("klein", "qwen-image", "ltx", "cog-video-x")
    )
