"""A family recorded from a draw of a pipeline says what the family that was written for it says."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import FLOW, GUIDED, PIPELINES, WITH_VAE, tiny_pipeline, tiny_prompts
from tiny_unknown import SIZES, run_of, unknown_pipeline

from stepdistill.cli.doctor import examine_teacher
from stepdistill.errors import UserError
from stepdistill.export.card import PLAIN, for_folder
from stepdistill.export.checks import grid_check, silent_draw, teacher_check
from stepdistill.families._classes import check_class
from stepdistill.families._guiders import guiders_of
from stepdistill.families._recording import record
from stepdistill.families.recorded import two_prompts
from stepdistill.families.size import Size
from stepdistill.families.stable_diffusion_3 import StableDiffusion3
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.chosen_terms import chosen_terms

Teachers = Callable[[str], PipelineTeacher]


# text-to-video's frames lie in its scheduler's batch, which recording refuses.
@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"wan-2.2", "sana-sprint", "text-to-video"}))
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
        name in WITH_VAE
        and name
        not in ("klein", "flux-2", "qwen-image", "ltx", "cog-video-x", "cog-video-x-1.5", "kandinsky5")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "grid", "found"),
    [
        ("AnimateDiffPipeline", 2, "LCM", "time its table index, output eps, guidance by negative prompt"),
        (
            "MochiPipeline",
            0,
            "FlowConsistency",
            "time 1000 - 1000 t, output -velocity, guidance by negative prompt",
        ),
        (
            "MotifVideoPipeline",
            0,
            "FlowMatchEulerDiscrete",
            "(plainly, not as its AdaptiveProjectedGuidance)",
        ),
    ],
)
def test_an_unknown_pipeline_is_recorded_trained_and_verified(
    name: str, rank: int, grid: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other classes of tiny_unknown.py: python tests/recorded_classes.py."""
    monkeypatch.setattr("stepdistill.training.finish.TEACHER_STEPS", 2)
    said, proof = run_of(name, tmp_path, rank)
    assert f"in 2 step(s) of {grid}Scheduler" in proof and re.search("by [01]/255 at most", proof)
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if "recorded from a draw of its own: replay equal" in line)
    assert found in lines[start] and re.fullmatch(r"teacher check: \de[-+]\d\d apart", lines[start + 1])


def test_what_a_recording_has_not_is_refused_with_the_reason() -> None:
    pipe = tiny_pipeline("cog-video-x")
    teacher = PipelineTeacher(pipe, family=record(pipe, *path_of(pipe.scheduler)))
    size = teacher.size
    with pytest.raises(UserError, match="how it encodes images: leave out what learns from images"):
        teacher.codec.to_states(torch.zeros(1, size.frames, 3, size.height, size.width))
    with pytest.raises(UserError, match=r"CogVideoXPipeline was recorded, .* set GAN weights to 0"):
        teacher.family.features_of(teacher.denoiser.net)
    recipe = load_recipe(sets=["terms.perceptual_weight=1"])
    with pytest.raises(UserError, match=r"need gradients through the decoder.*do without"):
        chosen_terms(recipe, teacher, ["cat"], None)
    with pytest.raises(UserError, match=f"was recorded at {size}"):
        teacher.family.check_size(teacher.pipe, Size(64, 64, 9))


@pytest.mark.slow
def test_a_vae_that_decodes_in_tiles_alone_decodes_so_and_one_after_another(tmp_path: Path) -> None:
    """Allegro's, which a folder cannot say of itself and whose tiles hold one video."""
    unknown_pipeline("AllegroPipeline").save_pretrained(tmp_path / "teacher")
    pipe = load_pipeline(tmp_path / "teacher")[0]
    family = record(pipe, *path_of(pipe.scheduler), SIZES["AllegroPipeline"])
    states = torch.randn(2, *family.found.state, generator=torch.Generator().manual_seed(1))
    frames = family.to_frames(pipe, states)
    assert frames.shape == (2, 24, 3, 160, 160) and frames.std() > 0.01
    assert torch.equal(frames[1:], family.to_frames(pipe, states[1:]))
    assert "pipe.vae.enable_tiling()" in for_folder(PLAIN, tmp_path / "teacher")


def test_what_cannot_be_recorded_is_told_in_one_line() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    two = tiny_pipeline("wan")
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    two.register_to_config(boundary_ratio=0.9)
    edit = StableDiffusionImg2ImgPipeline(**tiny_pipeline("sd").components, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    sound, size = unknown_pipeline("LTX2Pipeline"), Size(32, 16, 9)
    for pipe, its_size, reason in (
        (two, size, "several networks are called between its steps: transformer, transformer_2"),
        (
            edit,
            size,
            r"a draw of its own fails \(ValueError: .*; its call takes image, which no prompt gives",
        ),
        (sound, SIZES["LTX2Pipeline"], "it draws with copies of its scheduler, as for sound or each frame"),
    ):
        with pytest.raises(UserError, match=f"cannot be recorded: {reason}") as caught:
            record(pipe, *path_of(pipe.scheduler), its_size)
        assert "\n" not in str(caught.value) and "docs/extend/own_family.md" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("KandinskyV22CombinedPipeline", r"several stages, .* \(scheduler, prior_scheduler\)"),
        ("KandinskyV22Pipeline", "its call needs image_embeds, negative_image_embeds, which no prompt gives"),
        ("ShapEImg2ImgPipeline", "its call needs image, which no prompt gives"),
    ],
)
def test_a_class_that_cannot_be_recorded_is_refused_by_its_signatures(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"no family for {name}, and it cannot be recorded: .*{reason}"):
        check_class(getattr(diffusers, name))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        # Guided, it fails without a negative prompt.
        ("EasyAnimatePipeline", "time 1000 t, output velocity, guidance by negative prompt"),
        # Its scheduler is given each token's own time, and the velocity negated.
        ("LTXConditionPipeline", "time 1000 t, output velocity, guidance by negative prompt"),
        # Its guidance is a component; its state stands beside a picture's place.
        ("MotifVideoPipeline", "by negative prompt (plainly, not as its AdaptiveProjectedGuidance)"),
        # Its network returns prompt and picture; its VAE decodes transparency, too.
        ("QwenImage21Pipeline", "time t, output velocity, guidance by negative prompt"),
        # Each state is alone in a list of its own; it writes into the prompts that it is given.
        (
            "ZImageOmniPipeline",
            "time 1 - t, output -velocity, guidance by negative prompt (its scale is one less)",
        ),
        # It replaces the processors of its network's attention, and leaves them so.
        ("StableDiffusionSAGPipeline", "its table index, output eps, guidance by negative prompt"),
        # Beside its output, its network says a variance, and its call asks each scheduler whether it takes that.
        ("IFPipeline", "its table index, output eps, guidance by negative prompt"),
        ("HunyuanImagePipeline distilled", "guidance an input of the network"),
        ("PNDMPipeline", ""),
    ],
)
def test_a_class_that_nothing_was_written_for_draws_its_pipelines_picture(name: str, found: str) -> None:
    pipe, size = unknown_pipeline(name), SIZES.get(name)
    processors = {str(part) for part in pipe.components.values() if hasattr(part, "attn_processors")}
    teacher = PipelineTeacher(pipe, size=size)
    assert found in teacher.family.remark
    assert size is None or (teacher.size.height, teacher.size.width) == (size.height, size.width)
    apart = teacher_check(teacher, two_prompts(teacher.family.has_prompts)[1], 4)
    assert apart is not None and apart < 5e-5
    for part, guider in guiders_of(pipe).items():
        assert guider._enabled and not teacher.pipe.components[part]._enabled
    frames = teacher.codec.to_frames(torch.zeros(1, *teacher.codec.shape))
    assert frames.shape == (1, teacher.size.frames, 3, teacher.size.height, teacher.size.width)
    assert processors == {str(part) for part in pipe.components.values() if hasattr(part, "attn_processors")}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "Ideogram4Pipeline",
            "several networks are called between its steps: transformer, unconditional_transf",
        ),
        (
            "OmniGenPipeline",
            "a call of transformer for several states a step, at a guidance scale of 1, 0 and -1",
        ),
        ("StableDiffusionLDM3DPipeline", "it draws 2 things at once, and not pictures or videos alone"),
        (
            "PRXPixelPipeline",
            "it starts from 2 times standard normal noise|it needs ftfy, which is not installed",
        ),
    ],
)
def test_a_class_that_cannot_be_served_says_why(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        PipelineTeacher(unknown_pipeline(name), size=SIZES.get(name))
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["unet-ddim", "sd", "sdxl", "sd3", "flux"])
def test_a_teacher_draws_its_pipelines_picture(name: str, teacher_of: Teachers) -> None:
    before = torch.random.get_rng_state()
    apart = teacher_check(teacher_of(name), tiny_prompts(name, 1)[0], 3)
    assert apart is not None and apart < 1e-5
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("fault", [{"clock": "t"}, {"unpack": lambda self, x, state: -x}])
def test_a_wrong_clock_or_sign_is_found_before_training(fault: dict[str, Any]) -> None:
    wrong = type("Wrong", (StableDiffusion3,), fault)()
    with pytest.raises(UserError, match=r"StableDiffusion3Pipeline and the family .* draw two pictures"):
        teacher_check(PipelineTeacher(tiny_pipeline("sd3"), family=wrong), "a red heart", 2)


def test_a_pipeline_that_does_not_draw_by_itself_is_told_so() -> None:
    """Noise with a channel more than its network takes."""
    pipe = tiny_pipeline("sd3")
    pipe.transformer.register_to_config(in_channels=pipe.transformer.config.in_channels + 1)
    with pytest.raises(UserError, match=r"a StableDiffusion3Pipeline of these parts .*RuntimeError"):
        teacher_check(PipelineTeacher(pipe), "a red heart", 2)


def test_a_grid_that_is_not_the_students_is_found_without_calls_of_the_network(teacher_of: Teachers) -> None:
    """FlowMatchEuler wastes its last step where the pipeline passes a number of steps alone."""
    from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    teacher, sampler = teacher_of("sd3"), Sampler((1.0, 0.75, 0.5, 0.25), renoise=False)
    calls: list[int] = []
    hook = teacher.denoiser.net.get_submodule("norm_out").register_forward_hook(lambda *said: calls.append(1))
    call = {**teacher.family.call_arguments("", ["cat"], None, None), "num_inference_steps": 4}
    for kind, right in ((FlowMapEulerDiscreteScheduler, True), (FlowMatchEulerDiscreteScheduler, False)):
        pipe = copy.copy(teacher.pipe)
        pipe.register_modules(scheduler=kind(shift=1.0))
        seen = silent_draw(pipe, "transformer", call)
        if right:
            grid_check(seen, sampler, teacher.path)
        else:
            with pytest.raises(UserError, match=r"times \[1.0, 0.667, 0.334, 0.001\], not for student.times"):
                grid_check(seen, sampler, teacher.path)
    hook.remove()
    assert len(calls) == 2


def test_doctor_checks_a_teacher(tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    found = examine_teacher(str(tmp_path), "32,16")
    assert [(each.state, each.subject) for each in found] == [
        ("ok", "family"),
        ("ok", "teacher check"),
        *[("ok", "grid check")] * 4,
    ]
    assert re.fullmatch(r"\de[-+]\d\d apart in 4 steps", found[1].text)
    assert "FlowMapEulerDiscreteScheduler asks for 1, 0.75" in found[3].text
    for size, reason in (("33,32", "multiples of"), ("big", "--size is big")):
        broken = examine_teacher(str(tmp_path), size)[-1]
        assert broken.state == "broken" and reason in broken.text
