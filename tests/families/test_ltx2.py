"""LTX-2: a state is a video and its sound, which two copies of a scheduler step."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from tiny_unknown import SIZES, run_of, unknown_pipeline

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.evaluation.draw_into import as_named, draw_into
from stepdistill.evaluation.sample import sample
from stepdistill.export.checks import grid_check, silent_draw, teacher_check
from stepdistill.export.student_folder import pipeline_call, student_pipeline
from stepdistill.families import family_named
from stepdistill.families.ltx2 import UNGUIDED
from stepdistill.families.size import Size
from stepdistill.families.watching import watch
from stepdistill.networks.pictures import draw_as_pipeline, strip
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

SIZE = SIZES["LTX2Pipeline"]
PROMPT = "a red heart that beats"


@pytest.fixture(scope="module")
def teacher() -> PipelineTeacher:
    return PipelineTeacher(unknown_pipeline("LTX2Pipeline"), size=SIZE)


@torch.no_grad()
def test_video_and_sound_are_the_pipelines(teacher: PipelineTeacher) -> None:
    """Four of Euler's steps of one flat state, beside the call's own latents of both."""
    pipe, codec, seed = teacher.pipe, teacher.codec, torch.Generator().manual_seed(3)
    sides = {"height": SIZE.height, "width": SIZE.width, "num_frames": SIZE.frames}
    video, sound = pipe(
        PROMPT,
        **UNGUIDED,
        **sides,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        return_dict=False,
    )
    x, cond = torch.randn(1, *codec.shape, generator=seed), codec.encode([PROMPT])
    times = pipe.scheduler.sigmas.tolist()
    for t, s in pairwise(times):
        x = x + (s - t) * teacher.denoiser.raw(x, torch.tensor([t]), cond)
    seen = teacher.family.denormalised(pipe.vae, codec.family.decoded_part(pipe, x, SIZE))
    heard = teacher.family.scheduled(pipe, x, SIZE)[1]
    heard = pipe._denormalize_audio_latents(heard, pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std)
    assert torch.allclose(seen, video, atol=1e-4 * float(video.abs().max()))
    assert torch.allclose(heard, pipe._pack_audio_latents(sound), atol=1e-4 * float(sound.abs().max()))
    assert float(sound.std()) > 0.1


def test_what_the_schedulers_see_is_a_state_again(teacher: PipelineTeacher) -> None:
    x = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    parts = teacher.family.scheduled(teacher.pipe, x, SIZE)
    assert [part.ndim for part in parts] == [3, 3]
    assert sum(part[0].numel() for part in parts) == x[0].numel()
    assert torch.equal(teacher.family.unscheduled(teacher.pipe, parts, SIZE), x)


@pytest.mark.parametrize("renoise", [True, False])
def test_a_student_draws_the_trainers_picture(teacher: PipelineTeacher, renoise: bool) -> None:
    """With fresh noise, that of each copy of the scheduler follows from its own start."""
    net = teacher.denoiser
    assert teacher_check(teacher, PROMPT, 3) is not None
    student = Student(net.net, net.path, net.output, net.family, net.shape)
    sampler = Sampler(uniform_times(3), renoise)
    drawn = student_pipeline(student, sampler, teacher)
    call: dict[str, Any] = pipeline_call(type(drawn).__name__, sampler, teacher.codec, [PROMPT, "cat"])
    one = {**call, "prompt": call["prompt"][:1]}
    grid_check(silent_draw(drawn, net.family.network, one), sampler, net.path)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = torch.as_tensor(drawn(**call, generator=generators, output_type="np", return_dict=False)[0])
    ours = draw_as_pipeline(student, sampler, teacher.codec, [PROMPT, "cat"], [0, 1])
    assert (ours - strip(theirs.movedim(-1, 2))).abs().max() < 1e-4


def test_a_dynamic_shift_goes_by_the_videos_tokens_alone(teacher: PipelineTeacher) -> None:
    sides = {"height": SIZE.height, "width": SIZE.width, "num_frames": SIZE.frames}
    seen = watch(teacher.pipe, {"prompt": PROMPT, **UNGUIDED, **sides}, end_after=1)
    assert seen.copies == 1
    assert teacher.family.drawn_tokens(teacher.pipe, SIZE) == seen.steps[0].sample.shape[1]


def test_what_needs_sound_beside_a_video_is_refused(teacher: PipelineTeacher) -> None:
    with pytest.raises(UserError, match="LTX-2 learns from no videos here"):
        teacher.codec.to_states(torch.zeros(1, SIZE.frames, 3, SIZE.height, SIZE.width))
    with pytest.raises(UserError, match="set GAN weights to 0"):
        teacher.family.features_of(teacher.denoiser.net)
    with pytest.raises(UserError, match=r"data.size is 32x32, whose latents .* cannot be drawn as one"):
        family_named("LTX2Pipeline").check_size(teacher.pipe, Size(32, 32, 1))


@pytest.mark.slow
def test_a_student_is_trained_and_verified_and_draws_videos_with_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepdistill.training.finish.TEACHER_STEPS", 2)
    said, proof = run_of("LTX2Pipeline", tmp_path, 2)
    assert "LTX-2 is distilled with its sound" in said
    drawn = sample(str(tmp_path / "run"), [PROMPT])
    assert len(drawn.frames[0]) == SIZE.frames and drawn.rate == 24
    assert len(drawn.sounds) == 1 and drawn.sounds[0].rate == 16000 and len(drawn.sounds[0].samples) == 2
    into = tmp_path / "into"
    drawers = [as_named(str(tmp_path / "run"))]
    assert draw_into(into, drawers, [PROMPT], 2, kind="mp4", fps=12, progress=False) == {"student": 2}
    assert json.loads((into / "student" / "drawn.json").read_text())["fps"] == 12
    assert '"000001.mp4"' in (into / "student" / "metadata.jsonl").read_text()
    with av.open(str(into / "student" / "000000.mp4")) as film:
        assert float(film.streams.video[0].average_rate) == 12 and film.streams.audio[0].rate == 16000
        frames = [np.array(frame.to_image().convert("L")).astype(int) for frame in film.decode(video=0)]
    grey = [np.array(frame.convert("L")).astype(int) for frame in drawn.frames[0]]
    assert all(
        np.abs(a - b).mean() < 6 for a, b in zip(frames, grey, strict=True)
    )  # of colours, H.264 keeps less
    with pytest.raises(
        UserError, match=r"student holds pictures with format mp4, not png, fps 12\.0, not None"
    ):
        draw_into(into, drawers, [PROMPT], 2, progress=False)
    assert "in 2 step(s) of FlowMatchEulerDiscreteScheduler" in proof and re.search(
        "by [01]/255 at most", proof
    )
