"""Students measured against their teacher's own pictures, which are drawn once, and the prompts that are held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

import stepdistill
from stepdistill.data.held_out import HELD_OUT, LEAST, hold_out
from stepdistill.errors import UserError
from stepdistill.evaluation.against_teacher import FIRST_SEED, AgainstTeacher
from stepdistill.evaluation.scores import AGAINST
from stepdistill.families.size import Size
from stepdistill.features.load import load_features
from stepdistill.metrics.kid import paired_kernel_distance
from stepdistill.networks.pictures import teacher_pictures, to_uint8
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.sections import AgainstTeacherOptions
from stepdistill.training.preflight import check_recipe

PROMPTS = [f"a picture of {what}" for what in ("apples", "dogs", "the sun", "hands", "rain")]


@pytest.fixture(scope="module")
def teacher() -> PipelineTeacher:
    return PipelineTeacher(tiny_pipeline("sd"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def against(
    teacher: PipelineTeacher, counts: Sequence[int] = (2,), guidance: float = 1.0, pictures: int = 7
) -> AgainstTeacher:
    options = AgainstTeacherOptions(pictures=pictures, steps=3)
    return AgainstTeacher(teacher, guidance, counts, PROMPTS, held_out=True, options=options)


def test_a_student_that_draws_what_its_teacher_draws_is_at_zero(teacher: PipelineTeacher) -> None:
    """The teacher's own network, on the teacher's grid of 3 steps: its distance is 0; on that of 2 it is the teacher
    with 2 steps."""
    student = Student.from_teacher(teacher)
    samplers = {n: Sampler(schedule_times(teacher.path, n), renoise=False) for n in (2, 3)}
    protocol = against(teacher, (2, 3))
    protocol.prepare()
    found = protocol.scores(lambda steps: protocol.drawn(student, samplers[steps]))
    own, teachers = found["student"], found["teacher"]
    assert found["against"] == AGAINST and found["n"] == 7 and list(teachers["fd"]) == ["1", "2", "3"]
    assert own["paired_rmse"]["3"] < 1e-4 and own["paired_distance"]["3"] < 1e-6
    assert own["fd"]["3"] < 1e-3 and abs(own["kid"]["3"]) < 1e-5
    assert (teachers["fd"]["3"], teachers["kid"]["3"]) == (0, 0)
    for metric in ("fd", "kid", "paired_distance", "paired_rmse"):
        assert own[metric]["2"] == pytest.approx(teachers[metric]["2"], rel=1e-2, abs=1e-5)
    assert own["fd"]["2"] > own["fd"]["3"] and own["paired_rmse"]["2"] > 0.001
    assert "7, in 64 features" in found["remarks"][2] and "not against real images" in found["remarks"][0]


def test_pictures_are_the_teachers_and_drawn_once(
    teacher: PipelineTeacher, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    hook = teacher.denoiser.net.register_forward_pre_hook(lambda net, given: calls.append(len(given[0])))
    protocol = against(teacher, guidance=2.0)
    protocol.prepare()
    assert "5 prompts held out of training" in (told := capsys.readouterr().err)
    # 3 and 2 and 1 steps, each with and without the prompt, and 1 step without guidance.
    assert sum(calls) == 7 * 2 * (3 + 2 + 1) + 7 and "91 network samples in all" in told
    assert "7 in 3, 7 in 1, 7 in 2, 7 in 1 (unguided) steps" in told
    folder = protocol.reference.pictures.folder
    assert folder.parent == cache / "teacher_pictures"
    drawn = to_uint8(teacher_pictures(teacher, [PROMPTS[0]], [FIRST_SEED + 0], 3, 2.0))[0]
    there = np.asarray(Image.open(folder / "000000.png")).astype(int)
    assert np.abs(there - drawn.permute(1, 2, 0).numpy().astype(int)).max() <= 1
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(FIRST_SEED, FIRST_SEED + 7))

    calls.clear()
    against(teacher, guidance=2.0).prepare()
    assert not calls and "network samples" not in capsys.readouterr().err
    (folder / "000004.png").unlink()
    against(teacher, guidance=2.0).prepare()
    assert sum(calls) == 2 * 3
    hook.remove()


def test_the_teacher_at_one_step_is_at_its_better_guidance(teacher: PipelineTeacher) -> None:
    """Its scores are those of the pictures, of both guidances, that are nearer to the teacher's at full steps by the
    distance that closes the gap."""
    protocol = against(teacher, (1,), guidance=3.0)
    protocol.prepare()
    sampler = Sampler((1.0,), renoise=False)
    found = protocol.scores(lambda steps: protocol.drawn(Student.from_teacher(teacher), sampler))["teacher"]
    network, every = load_features("emoji"), range(7)
    full = protocol.reference.pictures.read(every)
    scores = []
    assert protocol.plain is not None
    for pictures in (protocol.few[1].pictures.read(every), protocol.plain.pictures.read(every)):
        distance = paired_kernel_distance(network.images(pictures), network.images(full), gamma=1.0).value
        rmse = ((pictures - full.float()) / 255).square().flatten(1).mean(1).sqrt().mean()
        scores.append((distance, float(rmse)))
    assert scores[0][0] != pytest.approx(scores[1][0], rel=1e-3)
    assert (found["kid"]["1"], found["paired_rmse"]["1"]) == pytest.approx(min(scores), rel=1e-5)


@pytest.mark.slow
def test_the_gap_is_closed_by_the_kernel_distance(capsys: pytest.CaptureFixture[str]) -> None:
    """1 - KID / KID of the teacher with one step, of a teacher whose first step is far from its third; of 7 pictures
    that KID is not told apart from 0, and there is no gap."""
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(3)
    teacher = PipelineTeacher(pipeline)
    student = Student.from_teacher(teacher)
    samplers = {n: Sampler(schedule_times(teacher.path, n), renoise=False) for n in (2, 3)}
    protocol = against(teacher, (2, 3), pictures=150)
    protocol.prepare()
    found = protocol.scores(lambda steps: protocol.drawn(student, samplers[steps]))
    one, two = found["teacher"]["kid"]["1"], found["student"]["kid"]["2"]
    assert one > 2 * found["teacher"]["kid_se"]["1"] and abs(two) > 1e-4
    assert found["gap_closed"] == pytest.approx({"2": 1 - two / one, "3": 1.0}, abs=1e-3)
    assert "not told apart from 0" not in capsys.readouterr().err
    assert found["suite"] == "against-teacher@2" and "pairs" in found["protocol"]["standard_errors"]

    few = against(teacher, (3,), pictures=7)
    few.prepare()
    assert few.scores(lambda steps: few.drawn(student, samplers[3]))["gap_closed"] == {}
    assert "gap closed is left out: the teacher's KID with one step is " in capsys.readouterr().err


def test_other_pictures_have_another_place_and_another_hash(teacher: PipelineTeacher) -> None:
    plain = against(teacher)
    other = PipelineTeacher(tiny_pipeline("sd"))
    with torch.no_grad():
        next(iter(other.denoiser.net.parameters())).add_(0.1)
    changed = [
        against(teacher, guidance=2.0),
        against(other),
        against(PipelineTeacher(tiny_pipeline("sdxl"))),
    ]
    hashes = {each.reference.sha256 for each in (plain, *changed)}
    assert len(hashes) == 4 and against(teacher, (4,)).reference.sha256 == plain.reference.sha256
    # More pictures of the same prompts are the same pictures and more; the protocol is another.
    assert against(teacher, pictures=7).reference.sha256 == plain.reference.sha256


def test_what_is_drawn_is_no_number_is_told(teacher: PipelineTeacher) -> None:
    student = Student.from_teacher(teacher)
    with torch.no_grad():
        next(iter(student.net.parameters())).fill_(torch.nan)
    protocol = against(teacher)
    protocol.prepare()
    sampler = Sampler(schedule_times(teacher.path, 2), renoise=False)
    with pytest.raises(UserError, match="the student drew NaN or Inf for one of"):
        protocol.scores(lambda steps: protocol.drawn(student, sampler))


def test_prompts_are_held_out_of_files_that_have_enough() -> None:
    prompts = [f"prompt {i}" for i in range(LEAST)]
    prompts[700] = prompts[10]  # told twice, and one of them held out: so is the other
    held, rest = hold_out(prompts)
    assert len(held) == HELD_OUT and "prompt 10" in held
    assert (
        list(rest)
        == [prompt for prompt in prompts if prompt not in held]
        == [rest[i] for i in range(len(rest))]
    )
    assert len(rest) == LEAST - HELD_OUT - 1 and rest[-1] == prompts[-1] and rest[5:9] == list(rest)[5:9]
    assert hold_out(prompts)[0] == held
    assert hold_out(prompts[1:]) == ([], prompts[1:])
    few = ["one", "two"] * LEAST
    assert hold_out(few) == ([], few)
    with pytest.raises(IndexError):
        rest[len(rest)]


SUITE: dict[str, Any] = {
    "name": "own", "version": 1, "n": 8, "prompts": "emoji", "resolution": 32, "reference": "emoji.safetensors",
    "teacher_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"n": 0, "clip_score": False}, "suite own@1 leaves n or resolution open: it measures images"),
        ({"prompts": "gone.txt"}, "suite own@1: no prompt file gone.txt in "),
        ({"reference": "gone.npz"}, "suite own@1: no reference statistics gone.npz in "),
        (
            {"features": "clip:gone", "clip_score": False},
            "features 'clip:gone': gone is not a transformers CLIPModel",
        ),
        (
            {"prompts": None, "clip_score": False},
            "suite own@1 has no prompts, from which StableDiffusionPipeline draws",
        ),
        ({"resolutoin": 3}, "own.yaml: resolutoin is not a key of a suite "),
    ],
)
def test_the_suite_is_checked_before_a_run(changes: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({**SUITE, **changes}))
    recipe = load_recipe(method="lcm", sets=[f"evaluate={file}"])
    if says is None:
        check_recipe(recipe)
        return
    with pytest.raises(UserError) as refused:
        check_recipe(recipe)
    assert str(refused.value).startswith("evaluate: ") and says in str(refused.value)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["evaluate=emojy"], "evaluate: no suite 'emojy' (did you mean emoji? "),
        (["evaluate=gone.yaml"], "evaluate: no suite file gone.yaml; "),
        (
            ["against_teacher.features=clip:gone"],
            "against_teacher.features: features 'clip:gone': gone is not a ",
        ),
        (["against_teacher.texts=clip:gone"], "against_teacher.texts: features 'clip:gone': gone is not a "),
        (["against_teacher.features=dini"], "against_teacher.features: features 'dini' are not known"),
    ],
)
def test_what_a_run_is_measured_in_is_checked_before_it(sets: list[str], says: str, tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "t")
    recipe = load_recipe(method="lcm", teacher=str(tmp_path / "t"), sets=sets)
    with pytest.raises(UserError) as refused:
        check_recipe(recipe)
    assert str(refused.value).startswith(says)


def test_a_grids_student_is_measured_at_all_its_counts(teacher: PipelineTeacher) -> None:
    sampler = Sampler(schedule_times(teacher.path, 2), renoise=True, grid=10)
    assert against(teacher, sampler.step_counts).counts == [1, 2, 4, 8]


def test_a_suite_of_another_size_than_a_pipeline_can_draw_is_told_before_training(tmp_path: Path) -> None:
    """UNet2D draws 8 x 8 pixels and nothing else."""
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({**SUITE, "prompts": None, "clip_score": False}))
    sets = [f"evaluate={file}", "options.guidance=1", "student.output=teacher"]
    with pytest.raises(
        UserError, match=r"evaluate: suite own@1 compares 32 x 32 pixels, and .* draws 8 x 8: set its"
    ):
        stepdistill.distill(tiny_pipeline("unet-classes"), "dmd", tmp_path / "run", sets=sets)
    with pytest.raises(UserError, match=r"evaluate: no suite 'emojy'"):
        stepdistill.distill(tiny_pipeline("unet-classes"), "dmd", tmp_path / "run", sets=["evaluate=emojy"])
    assert not (tmp_path / "run").exists()


def test_videos_are_measured_for_how_much_they_move() -> None:
    """Between the frames that are kept of them; a student whose videos stand still is at 0."""
    teacher = PipelineTeacher(tiny_pipeline("wan"), size=Size(16, 32, 9))
    protocol = against(teacher, (1,), pictures=4)
    protocol.prepare()
    kept = protocol.reference.pictures.read(range(4))
    assert kept.shape == (4, 3, 16, 3 * 32)
    still = kept[..., :32].repeat(1, 1, 1, 3)
    found = protocol.scores(lambda steps: [([0, 1, 2, 3], still)])
    first, middle, last = (kept[..., i : i + 32].double() / 255 for i in (0, 32, 64))
    steps = torch.stack([middle - first, last - middle], 1)
    wanted = float(steps.square().mean(dim=(1, 2, 3, 4)).sqrt().mean())
    assert wanted > 0.01 and found["teacher"]["motion"]["3"] == pytest.approx(wanted, rel=1e-5)
    assert found["student"]["motion"] == {"1": 0.0} and found["student"]["motion_se"] == {"1": 0.0}
    assert found["better"]["motion"] == "neither"
    assert any("near the teacher's is" in remark for remark in found["remarks"])
