"""Pictures by a student's own call, on a grid and into folders, and what is refused before anything is loaded."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from PIL import Image
from tiny import tiny_pipeline
from tiny_unknown import SIZES, unknown_pipeline

from stepdistill.cli import main
from stepdistill.data.captions import read_metadata
from stepdistill.errors import UserError
from stepdistill.evaluation.draw_into import Drawer, as_named, draw_into, teacher_of
from stepdistill.evaluation.drawing import Drawing, trailing
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.sample import sample
from stepdistill.evaluation.suite import Suite
from stepdistill.evaluation.video_pipelines import draws_videos
from stepdistill.networks.own_call import OwnCall, own_call

PROMPTS = ("red apple", "a dog")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: ``done``, whose student draws 16 x 16 pixels in 2 steps, and ``begun`` without one."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("done", "begun"):
        (folder / name).mkdir()
        recipe = "teacher: emoji\noptions: {guidance: 2.5}\ndata: {size: [16, 24]}\n"
        (folder / name / "recipe.yaml").write_text(recipe)
    student = folder / "done" / "student"
    tiny_pipeline("sd").save_pretrained(student)
    call = {"prompt": ["x"], "guidance_scale": 0.0, "num_inference_steps": 2, "height": 16, "width": 16}
    (student / "verification").mkdir()
    manifest = {"call": call, "seeds": [0], "step_counts": [2]}
    (student / "verification" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["stepdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("place", ["done", "done/student"])
def test_a_student_draws_as_its_proof_was_drawn(runs: Path, place: str) -> None:
    own = own_call(runs / "done" / "student")
    assert own is not None and (own.steps, own.counts, own.guidance) == (2, (2,), 0.0)
    pipe = tiny_pipeline("sd")
    calls: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pictures = sample(str(runs / place), PROMPTS, seed=3).pictures
    by_hand = pipe(
        PROMPTS[1], num_inference_steps=2, guidance_scale=0.0, height=16, width=16,
        generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    assert len(calls) == 2 and pictures[1].size == (16, 16)
    assert np.abs(np.asarray(pictures[1]).astype(int) - np.asarray(by_hand).astype(int)).max() <= 2


def test_eval_takes_a_students_own_count_and_refuses_others(runs: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "{name: s, version: 1, n: 3, prompts: emoji, resolution: 32, reference: emoji.safetensors, kid: false, "
        "neighbours: 0, teacher_steps: 4, draw_resolution: own}"
    )
    with pytest.raises(
        UserError, match=r"--steps is 4, but this student draws in 2 steps: leave --steps out"
    ):
        evaluate(runs / "done", suite, steps=[2, 4])
    report = evaluate(runs / "done", suite, progress=False)
    assert list(report.scores) == [2] and report.guidance == 1.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("sample {runs} apple", "{runs} holds 2 runs: begun, done: give one of them, such as {runs}/begun"),
        ("eval {runs}", "{runs} holds 2 runs: begun, done: give one of them"),
        ("eval {runs}/begun", "{runs}/begun is a run without a student so far: wait for its end, "),
        (
            "eval emoji --suite teacher",
            "--suite teacher: emoji is no finished run, so its teacher is not known",
        ),
        (
            "eval {foreign}",
            "{foreign} is neither a pipeline (it has no model_index.json) nor a run, and holds no ",
        ),
        (
            "sample {runs}/done apple --steps 4",
            "--steps is 4, but this student draws in 2 steps: leave --steps out",
        ),
        ("eval {runs}/done --steps 2,4", "--steps is 4, but this student draws in 2 steps"),
        (
            "geneval {runs}/done --steps 4 --prompts {file} --output {foreign}/o",
            "--steps is 4, but this student",
        ),
        (
            "sample {runs}/done",
            "sample: there is no prompt; give one, such as: stepdistill sample {runs}/done",
        ),
        ("sample {runs}/done --prompts {file}", "--prompts is for files in a folder: add --into DIR"),
        ("sample emoji x --format mp4", "--format is for files in a folder: add --into DIR"),
        ("sample emoji x --batch 4", "--batch is for files in a folder: add --into DIR"),
        ("sample emoji x --teacher-steps 4", "--teacher-steps is for files in a folder: add --into DIR"),
        (
            "sample {runs}/done x --into {foreign}/new --teacher-steps 4",
            "--teacher-steps is the teacher's: add --teacher, or leave it out",
        ),
        ("sample emoji x --fps 8", "--fps is of videos, and --output grid.png is none: give .mp4"),
        ("sample emoji x --into {foreign}/new --fps 8", "--fps is of videos: give --format mp4, webp or gif"),
        ("sample emoji x --into {foreign}/new --format avi", "--format avi: give one of png, mp4, webp, gif"),
        (
            "sample emoji x --into {foreign}/new --output x.png",
            "--output x.png is one file, --into {foreign}/new",
        ),
        (
            "sample {runs}/done x --into {foreign}/new --format mp4",
            "StableDiffusionPipeline draws pictures, not videos: give --format png",
        ),
        (
            "sample {runs}/done x --into {foreign}",
            "{foreign}/student holds other files (it has no drawn.json)",
        ),
        (
            "sample emoji x --into {foreign}/new --teacher",
            "--teacher: emoji is no student, and draws for itself",
        ),
    ],
)
def test_wrong_calls_are_one_line(
    arguments: str,
    says: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, foreign = tmp_path / "geneval.jsonl", tmp_path / "foreign"
    file.write_text('{"prompt": "a dog"}\n')
    (foreign / "student").mkdir(parents=True)
    (foreign / "student" / "notes.txt").write_text("x")
    names = {"runs": runs, "foreign": foreign, "file": file}
    assert command(monkeypatch, *(part.format(**names) for part in arguments.split())) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"stepdistill: {says.format(**names)}") and told.count("\n") == 1


def test_what_a_student_was_trained_for_is_a_range_and_guiding_it_is_warned_of(runs: Path) -> None:
    own = own_call(runs / "done" / "student")
    assert own is not None and own.warning(None) is None and own.warning(1.0) is None
    OwnCall(4, (1, 2, 4, 8), 0.0, {}).check_steps(3)
    with pytest.raises(UserError, match="draws in 1 to 8 steps"):
        OwnCall(4, (1, 2, 4, 8), 0.0, {}).check_steps(9)
    assert "--guidance 7.5: guidance is in this student's weights" in str(own.warning(7.5))


def test_pictures_of_student_and_teacher_go_into_folders_and_a_begun_one_is_finished(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, into = tmp_path / "prompts.txt", tmp_path / "into"
    prompts.write_text("\n".join(PROMPTS))
    given = ["sample", runs / "done", "--prompts", prompts, "--into", into, "--count", 3, "--seed", 5]
    assert command(monkeypatch, *given, "--teacher", "--teacher-steps", 2, "--batch", 2) == 0
    assert capsys.readouterr().out.split() == [str(into / "student"), str(into / "teacher")]
    rows = [json.loads(line) for line in (into / "student" / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file_name": "000002.png", "prompt": "red apple", "seed": 7}
    captions = read_metadata(into / "teacher")  # as data.images reads them
    assert captions[into / "teacher" / "000001.png"].text == "a dog"
    drawn = json.loads((into / "teacher" / "drawn.json").read_text())
    assert (drawn["guidance"], drawn["steps"], drawn["trailing"]) == (2.5, 2, True)
    assert Image.open(into / "teacher" / "000000.png").size == (24, 16)  # of the run's data.size
    (picture,) = sample(str(runs / "done"), [PROMPTS[0]], seed=7).pictures
    there = np.asarray(Image.open(into / "student" / "000002.png")).astype(int)
    assert np.abs(there - np.asarray(picture).astype(int)).max() <= 2

    (into / "student" / "000001.png").unlink()
    drawers = [as_named(str(runs / "done"))]
    assert draw_into(into, drawers, PROMPTS, 4, seed=5, progress=False) == {
        "student": 2
    }  # the lost, and one more
    with pytest.raises(UserError, match="holds pictures with first_seed 5, not 6: give another folder"):
        draw_into(into, drawers, PROMPTS, 4, seed=6, progress=False)
    with pytest.raises(UserError, match="student holds pictures with other prompts: give another folder"):
        draw_into(into, drawers, ["other"], 4, seed=5, progress=False)


def test_the_teacher_of_a_folder_outside_a_run_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder nor a student in one"):
        teacher_of(str(tmp_path))


def test_a_teacher_is_called_as_its_student_but_for_the_grid(tmp_path: Path) -> None:
    call = {"num_inference_steps": 2, "guidance_scale": 0.0, "eta": 0.3, "use_resolution_binning": False}
    (tmp_path / "student" / "verification").mkdir(parents=True)
    (tmp_path / "student" / "verification" / "manifest.json").write_text(json.dumps({"call": call}))
    (tmp_path / "recipe.yaml").write_text("teacher: emoji\noptions: {guidance: 3.0}\ndata: {size: [8, 16]}\n")
    drawer = teacher_of(str(tmp_path))
    assert drawer.arguments == {"use_resolution_binning": False, "height": 8, "width": 16}
    assert (drawer.guidance, drawer.steps, drawer.trailing) == (3.0, 25, True)


def test_a_prompt_that_is_a_file_of_prompts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("red apple\n")
    assert (
        command(monkeypatch, "sample", "emoji", "--prompt", tmp_path / "p.txt", "--into", tmp_path / "x") == 2
    )
    assert f"is a file, not a prompt: give --prompts {tmp_path / 'p.txt'}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_teacher_is_drawn_with_its_own_guidance_on_a_grid_and_into_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "sd"  # its scheduler leads, from a timestep before the last
    tiny_pipeline("sd").save_pretrained(folder)
    draw_into(tmp_path / "into", [as_named(str(folder), steps=2)], PROMPTS, 2, progress=False)
    drawn = json.loads((tmp_path / "into" / "teacher" / "drawn.json").read_text())
    assert (drawn["guidance"], drawn["trailing"]) == (7.5, False)
    on_grid = sample(str(folder), PROMPTS, steps=2).pictures
    for number, picture in enumerate(on_grid):
        there = np.asarray(Image.open(tmp_path / "into" / "teacher" / f"00000{number}.png")).astype(int)
        assert np.abs(there - np.asarray(picture).astype(int)).max() <= 2
    (unguided,) = sample(str(folder), PROMPTS[:1], steps=2, guidance=1).pictures
    assert np.abs(np.asarray(unguided).astype(int) - np.asarray(on_grid[0])).max() > 2
    assert as_named(str(folder), guidance=2.0).guidance == 2.0


def test_a_pipeline_with_a_list_of_sizes_draws_at_its_own_also_in_one_step(tmp_path: Path) -> None:
    folder = tmp_path / "pixart"  # with DPM-Solver, whose one step PixArt cannot read
    tiny_pipeline("pixart-alpha").save_pretrained(folder)
    drawers = [Drawer(folder, "teacher", 1, None, True)]
    draw_into(tmp_path / "into", drawers, PROMPTS[:1], 1, progress=False)
    (picture,) = sample(str(folder), PROMPTS[:1], steps=2).pictures
    assert Image.open(tmp_path / "into" / "teacher" / "000000.png").size == picture.size


@pytest.mark.parametrize(("kind", "steps"), [(PNDMScheduler, 3), (DPMSolverMultistepScheduler, 1)])
def test_the_scheduler_that_stands_in_clips_nothing_that_its_own_did_not(kind: Any, steps: int) -> None:
    stands_in, _ = trailing(kind(), steps, frozenset())
    assert isinstance(stands_in, DDIMScheduler)
    assert not stands_in.config["clip_sample"]


def test_one_step_of_dpm_solver_is_that_of_the_scheduler_that_stands_in() -> None:
    own = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    stands_in, _ = trailing(DPMSolverMultistepScheduler(), 1, frozenset())
    x, eps = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ends = []
    for scheduler in (own, stands_in):
        scheduler.set_timesteps(1)
        ends.append(scheduler.step(eps, scheduler.timesteps[0], x, return_dict=False)[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-3)


def test_a_class_conditional_pipeline_draws_all_classes_in_turn(tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline("dit")
    pipe.save_pretrained(tmp_path / "dit")
    drawers = [as_named(str(tmp_path / "dit"), steps=1)]
    assert draw_into(tmp_path / "into", drawers, None, 2, progress=False) == {"teacher": 2}
    assert len(list((tmp_path / "into" / "teacher").glob("*.png"))) == 2
    with pytest.raises(UserError, match="takes no prompts"):
        draw_into(tmp_path / "other", drawers, PROMPTS, 2, progress=False)


@pytest.mark.slow
def test_a_pipeline_whose_guidance_is_a_component_is_drawn_at_the_asked_scale(tmp_path: Path) -> None:
    pipe, size = unknown_pipeline("HunyuanImagePipeline"), SIZES["HunyuanImagePipeline"]
    suite = Suite(
        name="s", version=1, n=0, first_seed=5, resolution=0, draw_resolution="own", reference="", kid=False,
        clip_score=False, teacher_steps=1,
    ).model_copy(update={"n": 1})  # fmt: skip
    own = {"height": size.height, "width": size.width}

    def drawn(guidance: float | Literal["own"] | None) -> Any:
        drawing = Drawing(pipe, suite, ["a red heart"], guidance, False, own=own)
        its_own = pipe.guider.guidance_scale
        assert drawing.guidance == {None: 1.0, "own": its_own}.get(guidance, guidance)
        return next(drawing.batches(2, 1)).int()

    def called(**told: Any) -> Any:
        other = copy.copy(pipe)
        other.register_modules(guider=pipe.guider.new(**told))
        pictures = other(
            "a red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(5), **own
        )
        return torch.as_tensor(np.asarray(pictures.images[0])).permute(2, 0, 1)[None].int()

    for scale in (2.0, 9.0):
        assert (drawn(scale) - called(guidance_scale=scale)).abs().max() <= 1
    assert (drawn(None) - called(enabled=False)).abs().max() <= 1
    assert (drawn("own") - called()).abs().max() <= 1
    assert (drawn(2.0) - drawn(9.0)).abs().max() > 4 < (drawn(None) - drawn(9.0)).abs().max()
    pipe.save_pretrained(tmp_path)
    both = [
        np.asarray(sample(str(tmp_path), ["a red heart"], steps=2, seed=5, guidance=g).pictures[0])
        for g in (2.0, 9.0)
    ]
    assert np.abs(both[0].astype(int) - both[1]).max() > 4


@pytest.mark.parametrize("name", ["WanPipeline", "LattePipeline", "SanaVideoPipeline", "AnimateDiffPipeline"])
def test_pipelines_of_videos_are_known_whatever_their_calls_name_the_frames(name: str) -> None:
    assert draws_videos(getattr(diffusers, name)) and not draws_videos(diffusers.StableDiffusionPipeline)
