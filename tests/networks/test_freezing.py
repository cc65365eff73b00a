"""What of a student stays as it starts: which weights, to the last bit, and without an optimiser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from short_run import run
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.families.unet2d import UNet2D
from stepdistill.losses.consistency import Target
from stepdistill.networks.roles import Copies
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe


def roles_of(name: str) -> Copies:
    return Copies(PipelineTeacher(tiny_pipeline(name)))


def frozen(roles: Copies) -> set[str]:
    every = {name for name, _ in roles.student.net.named_parameters()}
    return every - set(roles.weights("student"))


@pytest.mark.parametrize("name", ["sd", "sdxl", "unet-ddpm", "unet-classes"])
def test_levels_of_a_unet_are_those_of_gdd(name: str) -> None:
    """Its substrings `conv` and `proj` would also take what the time acts through and the first and last layers."""
    layers, roles = {}, roles_of(name)
    for level in (1, 2, 3):
        roles.freeze([f"level-{level}"])
        layers[level] = {re.sub(r"\.\d+|\.(weight|bias)$", "", key) for key in frozen(roles)}
    kinds = {level: {key.rpartition(".")[2] for key in found} for level, found in layers.items()}
    assert {"conv1", "conv2", "conv", "to_out"} <= kinds[1] <= {
        "conv1", "conv2", "conv", "to_out", "proj_in", "proj_out"
    }  # fmt: skip
    assert kinds[2] - kinds[1] == {"to_q", "to_k", "to_v"} and kinds[3] - kinds[2] == {"conv_shortcut"}
    assert not any("attn2" in key or key in ("conv_in", "conv_out") for key in layers[3])
    kept = set(roles.weights("student"))
    assert any("time_emb_proj" in key for key in kept) and any("norm1" in key for key in kept)
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= kept


@pytest.mark.parametrize(
    "name", ["dit", "sd3", "flux", "wan", "pixart-alpha", "qwen-image", "z-image", "lumina2", "klein", "sana"]
)
def test_levels_of_a_transformer_leave_its_modulation_and_its_ends(name: str) -> None:
    roles = roles_of(name)
    shares = [roles.freeze([level]) for level in ("level-1", "level-2")]
    assert 0 < shares[0] < shares[1] < 1
    lost = frozen(roles)
    assert not [key for key in lost if re.search(r"norm|mod|embed|^proj_out|final|patch", key)]
    # All blocks are treated alike.
    stems = {re.sub(r"(blocks|layers)\.\d+", r"\1", key) for key in lost}
    assert len(lost) > len(stems) or len(roles.student.net.get_submodule(roles.student.family.blocks)) == 1  # type: ignore[attr-defined,arg-type]


def test_what_is_frozen_has_no_gradient_and_is_followed_by_nobody() -> None:
    roles = roles_of("unet-ddpm")
    roles.freeze(["conv1", "conv2"])
    assert frozen(roles) == {key for key, v in roles.student.net.named_parameters() if not v.requires_grad}
    target = Target(roles, 0.5)
    with torch.no_grad():
        for value in roles.parameters("student"):
            value.add_(1)
    target.update()
    start = dict(roles.teacher.start.net.named_parameters())
    for key, value in target.denoiser.net.named_parameters():
        moved = 0.0 if key in frozen(roles) else 0.5
        torch.testing.assert_close(value, start[key] + moved)


def test_frozen_weights_are_equal_bit_for_bit_after_steps_with_weight_decay(tmp_path: Path) -> None:
    more = ("train.weight_decay=0.5", "student.freeze=[level-1]")
    saved, job = run(tmp_path / "frozen", *more)
    roles = job.objective.method.roles
    assert isinstance(roles, Copies)
    teacher = dict(job.teacher.denoiser.net.named_parameters())
    kept, lost = roles.weights("student"), frozen(roles)
    assert lost and all(".ff." in key or ".to_out." in key for key in lost)
    for key, value in job.student.net.named_parameters():
        assert torch.equal(value, teacher[key]) == (key in lost)
    moments = [k for k in saved if "student" in k and k.endswith("exp_avg")]
    assert len(moments) == len(kept)
    assert type(job.student.net) is type(job.teacher.denoiser.net)  # exported as any other
    fake = dict(roles["fake"].net.named_parameters())  # the student's alone
    assert not any(torch.equal(fake[key], teacher[key]) for key in lost)


def test_bfloat16_weights_leave_the_frozen_ones_exact(tmp_path: Path) -> None:
    more = ("train.precision=bf16", "train.weights=bf16", "student.freeze=[level-1]")
    _, job = run(tmp_path / "low", *more)
    start = dict(PipelineTeacher(tiny_pipeline("dit")).denoiser.net.named_parameters())
    roles = job.objective.method.roles
    assert isinstance(roles, Copies)
    for key in frozen(roles):
        assert torch.equal(dict(job.student.net.named_parameters())[key], start[key])


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["conv3"], r"student.freeze has conv3, which is in no name of a parameter \(did you mean conv"),
        (["level-4"], r"student.freeze has level-4, .*did you mean level"),
        (["conv1", "a+b"], "student.freeze has a"),
        (["e", "s", "o"], r"student.freeze is \['e', 's', 'o'\], which leaves nothing to train"),
    ],
)
def test_a_part_that_names_nothing_or_all_is_refused(wanted: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        roles_of("unet-ddpm").freeze(wanted)


def test_a_part_is_taken_literally() -> None:
    """`.` is a dot and no pattern; a level alone is one."""
    assert set(UNet2D.freezable) == {"level-1", "level-2", "level-3", "all-but-prompts"}
    roles = roles_of("unet-ddpm")
    with pytest.raises(UserError):
        roles.freeze(["conv.weight.conv"])
    roles.freeze(["mid_block.resnets.0.conv1.weight"])
    assert frozen(roles) == {"mid_block.resnets.0.conv1.weight"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["student.lora_rank=2"], "freeze is .* and lora_rank is 2, but an adapter"),
        (["student.freeze=['']"], "freeze"),
    ],
)
def test_a_recipe_that_cannot_freeze_says_so_before_anything_loads(more: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(None, method="dmd", sets=["student.freeze=[conv1]", *more])


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("slimflow", (), "SlimFlow gives the student a network of its own"),
        ("phased_dmd", ("student.times=[1.0, 0.5]",), "phased_dmd trains several networks"),
    ],
)
def test_methods_with_other_networks_refuse(method: str, more: tuple[str, ...], says: str) -> None:
    from accelerate import Accelerator
    from run_toy import HERE

    from stepdistill.training.assemble import assemble
    from stepdistill.training.identity import resolve

    sets = ["student.freeze=[conv1]", "student.output=teacher", "evaluate=false", *more]
    recipe = load_recipe(HERE / "empty.yaml", method=method, sets=sets)
    with pytest.raises(UserError, match=says):
        assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("unet-ddpm"))


def test_a_student_that_gets_a_second_time_keeps_what_is_frozen() -> None:
    roles = roles_of("unet-ddpm")
    roles.freeze(["level-1"])
    before = frozen(roles)
    assert isinstance(roles.student, Student)
    roles.student.add_second_time()
    assert frozen(roles) == before
    assert any("class_embedding" in key for key in roles.weights("student"))
