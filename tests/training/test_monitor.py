"""The watch of a run: it changes nothing, goes on with the run, finds what goes wrong, and does what is wanted."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from faults import FAULTS, Under, one_image, run_with
from run_toy import HERE, emoji_recipe_of
from safetensors.torch import load_file
from tiny import tiny_pipeline

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.methods import find_method
from stepdistill.metrics.motion import changes
from stepdistill.networks.roles import Copies
from stepdistill.recipes.health_options import HealthOptions, SignName
from stepdistill.recipes.recipe import load_recipe
from stepdistill.testing.toys import Perceptron, ToyTeacher, toy_student
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import OWN_HASH, checkpoints_in
from stepdistill.training.health import Seen, looks_of
from stepdistill.training.identity import resolve
from stepdistill.training.judging import Judge
from stepdistill.training.loop import train
from stepdistill.training.probe import deviation, spread
from stepdistill.training.run_curves import curves
from stepdistill.training.signs import OF_THE_TEACHERS, SIGNS, growth, plateau
from stepdistill.training.training_data import training_data


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory_bytes")} for row in rows]


def tensors_of(folder):
    last = checkpoints_in(folder / "work" / "checkpoints")[-1]
    files = [file for file in sorted(last.glob("*.safetensors")) if file.stem != "health"]
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def start(recipe, folder, resume=False, preview=None):
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, None)
    return train(
        job.objective, training_data(job, folder), recipe, folder, accelerator, resume=resume, preview=preview
    )


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_with_looks_is_the_run_without_them_and_resumes_with_the_same_looks(tmp_path):
    """Weights, moments, average and curve to the last bit, and in the second part the numbers of every look: also of
    one whose weights were taken before the checkpoint."""
    start(emoji_recipe_of("dmd", 12, "health.every=0"), tmp_path / "without")
    start(emoji_recipe_of("dmd", 12, "health.every=4"), tmp_path / "with")
    plain, watched = rows_of(tmp_path / "without"), rows_of(tmp_path / "with")
    numbers = [{k: v for k, v in row.items() if k.startswith("health_")} for row in watched]
    assert [bool(each) for each in numbers] == [update % 4 == 3 for update in range(12)]
    assert {"health_lag", "health_field_low", "health_diversity_of_prompts"} <= numbers[11].keys()
    assert "health_moved_student" in numbers[11] and "health_average" in numbers[11]
    keys = ("update", "network", "loss", "grad_norm", "lr")
    assert [[row[k] for k in keys] for row in plain] == [[row[k] for k in keys] for row in watched]
    assert_equal(tensors_of(tmp_path / "without"), tensors_of(tmp_path / "with"))

    def kill(step, ema):
        if step == 7:
            raise Killed
        return Seen({}, [])

    again = emoji_recipe_of("dmd", 12, "health.every=4", "train.preview_every=1", "train.checkpoint_every=3")
    with pytest.raises(Killed):
        start(
            emoji_recipe_of("dmd", 12, "health.every=4", "train.preview_every=1"),
            tmp_path / "parts",
            preview=kill,
        )
    assert checkpoints_in(tmp_path / "parts" / "work" / "checkpoints")[-1].name == "step-00000005"
    with pytest.raises(UserError, match=r"train\.checkpoint_every"):
        start(again, tmp_path / "parts", resume=True)
    start(emoji_recipe_of("dmd", 12, "health.every=4"), tmp_path / "parts", resume=True)
    assert rows_of(tmp_path / "parts") == watched
    assert_equal(tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "with"))


def test_a_checkpoint_of_a_run_that_was_not_watched_is_gone_on_from(tmp_path):
    start(emoji_recipe_of("lcm", 5), tmp_path)
    last = checkpoints_in(tmp_path / "work" / "checkpoints")[-1]
    state = json.loads((last / "state.json").read_text())
    del state[OWN_HASH], state["files"]["health.safetensors"]
    (last / "state.json").write_text(json.dumps(state))
    assert start(emoji_recipe_of("lcm", 5), tmp_path, resume=True).step == 5


class PoisonedOnce:
    """A pair is not a number, the first time that a step is made."""

    def __init__(self, step):
        self.step, self.done = step, False

    def __call__(self, under: Under) -> None:
        plain = under.data.batch

        def batch(step, *which):
            made = plain(step, *which)
            if step == self.step and not self.done:
                self.done = True
                made.pairs.x0[0] = math.nan
            return made

        under.set(under.data, "batch", batch)


@pytest.mark.slow
def test_a_run_that_rolls_back_goes_on_from_the_checkpoint_with_the_changed_rate_and_says_so(tmp_path):
    """It is the run that is resumed from there at half the rate, to the last bit."""
    recipe = emoji_recipe_of("lcm", 12, "health.every=4", "health.on_trouble=roll_back")
    outcome = run_with(recipe, tmp_path / "back", PoisonedOnce(7))
    assert outcome.ended is None and outcome.recognised == 8 and outcome.signs == ["not_finite"]
    rows = rows_of(tmp_path / "back")
    assert [row["update"] for row in rows] == list(range(12))
    assert [row["lr"] for row in rows] == [1e-4] * 5 + [0.5e-4] * 7
    assert rows[5]["worries"] == [
        "not_finite: the loss of the student is not a finite number; rolled back to update 5 and slowed down: rate of "
        "the student times 0.5"
    ]
    assert not any("worries" in row for row in rows if row["update"] != 5)
    start(emoji_recipe_of("lcm", 12, "health.every=4", "train.keep=9"), tmp_path / "whole")
    for later in checkpoints_in(tmp_path / "whole" / "work" / "checkpoints"):
        if later.name > "step-00000005":
            shutil.rmtree(later)
    slower = lambda under: under.set(under.job.objective, "lr_ratio", lambda turn: 0.5)  # noqa: E731
    run_with(
        emoji_recipe_of("lcm", 12, "health.every=4"), tmp_path / "slower", slower, resume=tmp_path / "whole"
    )
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "slower"))
    states = [checkpoints_in(tmp_path / name / "work" / "checkpoints")[-1] for name in ("back", "slower")]
    back, slower = (json.loads((each / "state.json").read_text())["passes"] for each in states)
    student = [each["student"]["with_graph"] for each in (back, slower)]
    assert student[0] == student[1] + 3 * 4  # the updates that were made in vain


@pytest.mark.slow
def test_a_run_that_rolled_back_and_was_killed_is_slower_still(tmp_path):
    """The checkpoint that it went back to is the last one, and has the changed rate."""
    recipe = emoji_recipe_of(
        "lcm", 12, "health.every=4", "health.on_trouble=roll_back", "train.checkpoint_every=2"
    )
    poison = PoisonedOnce(7)
    with pytest.raises(Killed):
        run_with(recipe, tmp_path, lambda under: kill_after(under, poison))
    names = [each.name for each in checkpoints_in(tmp_path / "work" / "checkpoints")]
    assert names[-1] == "step-00000004"
    start(recipe, tmp_path, resume=True)
    assert [row["lr"] for row in rows_of(tmp_path)] == [1e-4] * 4 + [0.5e-4] * 8


def kill_after(under, poison):
    """Ends the run at the first update after its poisoned one, which it then makes anew."""
    poison(under)
    plain = under.data.batch

    def batch(step, *which):
        if poison.done:
            raise Killed
        return plain(step, *which)

    under.set(under.data, "batch", batch)


@pytest.mark.slow
def test_a_sign_slows_the_run_down_and_then_stops_it(tmp_path):
    """When a measure had time and the sign is still there, and no more of them are allowed."""
    more = ["health.every=4", "health.actions={data: slow_down}", "health.most=1"]
    outcome = run_with(emoji_recipe_of("lcm", 40, *more), tmp_path, one_image)
    assert [(at, signs, done.action) for at, signs, done in outcome.treatments] == [
        (4, ["data"], "slow_down"),
        (20, ["data"], "stop"),
    ]
    rows = rows_of(tmp_path)
    assert [row["lr"] for row in rows] == [1e-4] * 4 + [0.5e-4] * 16
    assert rows[3]["worries"][0].startswith("data: the pairs of a batch differ 0.000 times as much as")
    assert rows[3]["worries"][0].endswith("slowed down: rate of the student times 0.5 from update 4")
    assert outcome.ended is not None
    assert outcome.ended.startswith("stopped after update 20 after 1 measures (health.most): data: the pairs")
    assert "To do: look at data.images" in outcome.ended


@pytest.mark.slow
def test_what_is_only_said_is_said_once_while_it_lasts(tmp_path):
    outcome = run_with(emoji_recipe_of("lcm", 12, "health.every=4"), tmp_path, one_image)
    assert [at for at, _, _ in outcome.treatments] == [4] and outcome.ended is None


SHORT = [
    "health.every=8", "options.warm_start=0", "options.fake_warm_start=4", "options.pair_weight=0.1",
    "student.times=[1.0]", "options.fake_lr_ratio=10", "train.checkpoint_every=16", "train.lr=1e-5",
]  # fmt: skip
QUICK = [name for name in FAULTS if name not in ("wrong sign", "too high rate")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of 16 updates, with two looks."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    outcome = run_with(emoji_recipe_of("dmd", 16, *SHORT), folder)
    assert not outcome.treatments
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_recognised(name, begun, tmp_path):
    """tests/injections.py makes the same of a student that draws, with every fault and the usual distance of looks."""
    signs = {
        "frozen follower": "still", "wrong time scale, teacher": "teacher", "collapsed prompts": "collapse",
        "oversaturating guidance": "guidance", "NaN in one sample": "not_finite", "stale average": "average",
        "data of one image": "data",
    }  # fmt: skip
    recipe = emoji_recipe_of("dmd", 56, *SHORT, "health.on_trouble=stop")
    state = checkpoints_in(begun / "work" / "checkpoints")[-1] / "state.json"
    shutil.copytree(begun, tmp_path / "begun")
    copy = tmp_path / "begun" / state.relative_to(begun)
    content = json.loads(copy.read_text())
    content["recipe"]["train"]["updates"] = 56
    del content[OWN_HASH]
    copy.write_text(json.dumps(content))
    outcome = run_with(recipe, tmp_path / "run", FAULTS[name], 16, resume=tmp_path / "begun")
    assert outcome.recognised is not None and outcome.recognised <= 56
    assert signs.get(name, outcome.signs[0]) in outcome.signs


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
from unittest.mock import patch
from accelerate import Accelerator
from faults import Under, one_image
from run_toy import emoji_recipe_of
from stepdistill.system.processes import launched
from stepdistill.training.assemble import assemble
from stepdistill.training.training_data import training_data
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.parallel import parallel_of
import contextlib
folder = Path(sys.argv[2])
accelerator = Accelerator(cpu=True)
parallel = parallel_of("auto", launched(), accelerator.device)
if accelerator.is_main_process:
    folder.mkdir(parents=True, exist_ok=True)
accelerator.wait_for_everyone()
recipe = emoji_recipe_of("lcm", 14, "health.every=3", "health.on_trouble=roll_back", "health.most=1")
job = assemble(resolve(recipe), accelerator, None)
data = training_data(job, folder)
with contextlib.ExitStack() as undo:
    plain, begun = job.objective.turn, []
    def turn(step):
        if step >= 6 and not begun:
            begun.append(step)
            one_image(Under(job, data, undo))
        return plain(step)
    job.objective.turn = turn
    train(job.objective, data, recipe, folder, accelerator, parallel=parallel)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_gloo_processes_find_and_do_what_one_does(tmp_path):
    """They go back to the same checkpoint at the same update, and go on at the same rate."""
    script = tmp_path / "two.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "29531", str(script), str(HERE), str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = emoji_recipe_of("lcm", 14, "health.every=3", "health.on_trouble=roll_back", "health.most=1")
    run_with(recipe, tmp_path / "one", one_image, 6)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["lr"] for row in one] == [1e-4] * 5 + [0.5e-4] * 9 == [row["lr"] for row in two]
    assert [row.get("worries") for row in one] == [row.get("worries") for row in two]
    assert "rolled back to update 5" in one[5]["worries"][0]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a.keys() == b.keys()


def test_every_sign_has_a_sentence_a_reason_and_a_cure_and_a_recipe_knows_its_name():
    assert set(SIGNS) == set(get_args(SignName))
    for name, sign in SIGNS.items():
        said = sign.sentence(name, 1.0, "student", "low")
        assert said.startswith(f"{name}: ") and "{" not in said and sign.why and sign.cure
    options = HealthOptions(on_trouble="slow_down", actions={"lag": "stop"})
    assert options.action("lag") == "stop" and options.action("rate") == "slow_down"
    with pytest.raises(UserError, match=r"health\.actions"):
        load_recipe(HERE / "empty.yaml", method="lcm", sets=["health.actions={lagg: stop}"])


def test_numbers_of_samples_are_what_they_are_called():
    """Of white noise spread is sqrt(2), deviation 1; a shift of a channel is no deviation, and of samples that are one
    there is no spread."""
    x = (
        torch.randn(400, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        + torch.arange(4.0)[:, None, None]
    )
    assert deviation(x) == pytest.approx(1.0, rel=0.02)
    assert spread(x.flatten(1)[:, None]) == pytest.approx(math.sqrt(2), rel=0.02)
    assert spread(x[:1].expand(5, -1, -1, -1).flatten(1)[:, None]) == 0
    video = x.view(50, 8, 4, 8, 8)
    assert changes(video).tolist() == pytest.approx([math.sqrt(2)] * 50, rel=0.1)
    assert not changes(video[:, :1].expand(-1, 8, -1, -1, -1)).any()


def test_videos_that_come_to_be_one_picture_are_seen(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path / "wan")

    def still(under: Under) -> None:
        """In one step from noise a velocity is the noise without the picture."""
        plain = under.job.student._called

        def called(x_t, time, cond):
            x0 = x_t - plain(x_t, time, cond)
            return x_t - x0.mean(2, keepdim=True)

        under.set(under.job.student, "_called", called)

    more = ["data.size=[16, 32, 9]", "student.times=[1.0]", "options.warm_start=0", "options.pair_weight=0"]
    recipe = emoji_recipe_of(
        "dmd", 4, f"teacher={tmp_path / 'wan'}", "health.every=1", "train.batch=2", *more
    )
    outcome = run_with(recipe, tmp_path / "run", still, 2)
    moving = [row["health_motion"] for row in rows_of(tmp_path / "run")]
    assert min(moving[:2]) > 0.7 and max(moving[2:]) < 1e-5
    said = [line for _, _, done in outcome.treatments for line in done.sentences]
    assert "motion: the student's videos move 0.00 times as much as the teacher's" in said


def test_a_loss_that_no_longer_falls_is_a_plateau_and_one_that_falls_is_none():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1)).tolist()
    flat = [{"update": i, "network": "student", "loss": 1 + 0.1 * e, "lr": 1.0} for i, e in enumerate(noise)]
    falls = [{**row, "loss": row["loss"] + 2 - i / 200} for i, row in enumerate(flat)]
    assert plateau(flat) == 200 and plateau(falls) is None and plateau(flat[:150]) is None
    slower = [{**row, "lr": 1 - i / 400} for i, row in enumerate(flat)]
    assert plateau(slower) is None and plateau([]) is None


def test_looks_are_kept_thinned_for_the_report_and_drawn_on_the_page():
    rows = [
        {
            "update": i,
            "network": "student",
            "loss": 1.0,
            "health_lag": i / 256,
            "health_moved_student": 1e-3,
        }
        for i in range(200)
    ]
    looks = looks_of(rows)
    assert len(looks) <= 48 and looks[-1] == {"update": 200, "lag": 199 / 256, "moved_student": 1e-3}
    drawn = "".join(curves(rows, 200))
    assert "Lag of the follower" in drawn and "Update over weights" in drawn and "Guided" not in drawn


def test_what_goes_up_and_down_by_itself_has_not_grown():
    """Gradients of dmd_emoji_4step when it was taken for unwell, and what an explosion looks like after them."""
    before = [0.7, 22.0, 1.6, 2.6, 34.7, 4.2, 3.1, 16.4, 0.9, 52.2, 7.3, 2.0]
    recent = [18.0, 6.6, 36.0, 33.2, 1.9, 67.6, 57.2, 54.9]
    assert growth(before, recent) == 0.0
    assert growth(before, [10 * x for x in recent]) == pytest.approx(10 * 34.6 / 3.65)
    assert growth([1.0] * 9, [9.0] * 8) == 9.0 and growth([0.0] * 9, [9.0] * 8) == 0.0


def found_of(judge, **numbers):
    """Signs that a look finds, whose numbers are those of a healthy run but for some; it looks thrice."""
    healthy = {
        "teacher_change": 0.0,
        "latent_mean": 0.0,
        "latent_deviation": 1.0,
        "towards": 0.5,
        "extremes": 0.01,
        "diversity_of_noises": 1.0,
        "motion": 1.0,
        "high_frequencies": 1.0,
    }
    judge.of_look(healthy, 0, ["fake"])
    looks = [judge.of_look({**healthy, **numbers}, step, ["fake"]) for step in (40, 48, 80)]
    return {trouble.sign for found in looks for trouble in found}


def test_samples_that_are_not_what_is_trained_yet_are_not_judged():
    """What a network of random weights draws passes from noise to blur: neither is an alarm, nor is what it passed the
    best that it was."""
    off = {
        "diversity_of_noises": 0.4,
        "motion": 0.4,
        "high_frequencies": 0.4,
        "latent_mean": 0.9,
        "extremes": 0.2,
    }
    signs = {"collapse", "motion", "spectrum", "drift", "oversaturation"}
    assert found_of(Judge(["student"]), **off) == signs
    off["follower_error_low"] = 2.0  # of those samples
    assert found_of(Judge(["student"]), **off) == {*signs, "denoising"}
    assert found_of(Judge(["student"], judged_from=81), teacher_error_low=2.0) == {"denoising"}
    assert not found_of(Judge(["student"], judged_from=81), **off)
    assert found_of(Judge(["student"], judged_from=81), **{"moved student": 0.2, **off}) == {"rate"}
    del off["follower_error_low"]
    judge = Judge(["student"], judged_from=40)  # the look at 0, at a healthy student, is none of its looks
    assert not found_of(judge, **off)
    assert found_of(judge, **{**off, "diversity_of_noises": 0.1, "high_frequencies": 0.1}) == {
        "collapse",
        "spectrum",
    }


def test_the_first_hundred_updates_of_a_warm_start_are_not_judged():
    options = find_method("dmd").Options
    assert [options(warm_start=count).judged_from for count in (0, 30, 3000)] == [0, 30, 100]
    assert find_method("lcm").Options().judged_from == 0


def test_a_student_that_is_led_elsewhere_is_not_held_to_its_teacher():
    numbers = {
        "latent_mean": 0.9,
        "towards": -0.5,
        "extremes": 0.2,
        "high_frequencies": 2.5,
        "moved student": 0.2,
    }
    assert found_of(Judge(["student"], False), **numbers) == {*OF_THE_TEACHERS, "rate"}
    assert found_of(Judge(["student"], True), **numbers) == {"rate"}
    kind = find_method("uni_dad")
    path = FlowPath()
    for share in (0.25, 0.0):
        roles = Copies(
            ToyTeacher(Perceptron(), path, "velocity"), toy_student(Perceptron(seed=1), path, "velocity")
        )
        method = kind(roles, (1.0,), kind.Options(target_share=share))
        assert method.leaves_teacher == bool(share)
        assert all(one.of_data == (name == "target") for name, one in method.trained().items())
