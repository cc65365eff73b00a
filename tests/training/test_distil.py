"""From recipe to report: foreign teachers, the Python entry, what a run folder holds, and what is refused early."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from tiny import SIZES, tiny_pipeline, tiny_teacher

import stepdistill
from stepdistill.comparison.ranking import rank
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import check_export
from stepdistill.export.verify import verify
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.pages.videos import save_video
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.files import sha256_of
from stepdistill.system.run_folder import RunFolder, read_status
from stepdistill.training.distil import export_run, run_recipe
from stepdistill.training.measure_again import measure_again
from stepdistill.training.run_report import read_report

SHORT = [
    "train.batch=4",
    "train.checkpoint_every=4",
    "train.preview_every=4",
    "evaluate=false",
    "student.output=teacher",
]


def saved(name, folder):
    tiny_pipeline(name).save_pretrained(folder)
    return folder


def assert_usual_modes(folder):
    """Everybody who may read a new file may read these."""
    mask = os.umask(0)
    os.umask(mask)
    files = [file for file in folder.rglob("*") if not file.is_symlink()]
    odd = [
        file for file in files if file.stat().st_mode & 0o777 != (0o777 if file.is_dir() else 0o666) & ~mask
    ]
    assert len(files) > 30 and not odd


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\ndog\ncat face\nsun\nwaving hand\n")
    return f"data.prompts={file}"


@pytest.mark.slow
def test_runs_of_two_precisions_follow_each_other_in_one_process(tmp_path):
    losses = {}
    for precision in ("float32", "bf16", "float32"):
        sets = [
            *SHORT,
            "train.updates=1",
            "train.preview_every=0",
            "options.guidance=1",
            f"train.precision={precision}",
        ]
        run = stepdistill.distill(tiny_pipeline("unet-classes"), "dmd", tmp_path / precision, sets=sets)
        losses.setdefault(precision, []).append(json.loads((run.folder / "stats.jsonl").read_text())["loss"])
        shutil.rmtree(run.folder)
    assert losses["float32"][0] == losses["float32"][1] != losses["bf16"][0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_packed_and_moving_teachers_are_distilled_and_their_students_verified(name, rank, tmp_path, prompts):
    """Flux, whose guidance is an input, and Wan, a video, at the size that the recipe states; then resumed."""
    teacher, size = saved(name, tmp_path / name), SIZES[name]
    sets = [
        *SHORT,
        prompts,
        "train.batch=2",
        "train.checkpoint_every=2",
        f"data.size={[size.height, size.width, size.frames][: 3 if name == 'wan' else 2]}",
        f"student.lora_rank={rank}",
        "student.times=[1.0, 0.9]",
        "options.guidance=2",
        "options.fake_warm_start=0",
    ]
    sets.append("train.updates=4")
    begun, output = load_recipe(teacher=str(teacher), method="dmd", sets=sets), tmp_path / "run"
    short = begun.model_copy(update={"train": begun.train.model_copy(update={"budget_seconds": 1e-9})})
    first = f"stepdistill train --teacher {teacher} --output {output}"
    run_recipe(short, output=output, command=first)
    run = run_recipe(begun, output=output, command="stepdistill train --resume", resume=True)
    assert run.report is not None and re.search("by [01]/255 at most", run.report.verification)
    assert run.report.updates == 4
    assert run.report.command == first
    assert [(each.command, each.update) for each in run.report.resumes] == [("stepdistill train --resume", 1)]
    card = (run.student / "README.md").read_text()
    assert f"height={size.height}" in card and f"width={size.width}" in card
    assert f"| `stepdistill train --teacher {name} --output run` |" in card and "--resume" not in card
    assert "| resumed at update | 1 |" in card
    with Image.open(run.student / "verification" / "0.png") as picture:
        assert picture.size == (size.width * (3 if name == "wan" else 1), size.height)
    films = sorted((output / "pictures").glob("*.webp"))
    assert ("data:image/webp" in (output / "report.html").read_text()) == bool(films) == (name == "wan")
    for film in films:
        with Image.open(film) as moving:
            assert moving.n_frames == size.frames and moving.width > 4 * size.width


@pytest.mark.slow
def test_a_flow_teacher_is_distilled_by_dmd_and_its_run_folder_is_whole(tmp_path, prompts, monkeypatch):
    """SD3 folder, own prompts, two Euler steps: student verified, measured against the teacher's pictures, every file
    of the run there and readable."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    teacher = saved("sd3", tmp_path / "sd3")
    sets = [
        *SHORT,
        prompts,
        "train.updates=8",
        "options.fake_updates=1",
        "student.times=[1.0, 0.5]",
        "options.guidance=2",
        *("evaluate=true", "against_teacher.pictures=4", "against_teacher.steps=3"),
    ]
    run = stepdistill.distill(teacher=teacher, method="dmd", output=tmp_path / "run", sets=sets)
    assert run.student == tmp_path / "run" / "student"
    log = (run.folder / "log.txt").read_text()
    assert "against 4 pictures of the teacher (3 steps, guidance 2) of 4 prompts of training" in log
    assert (
        "4 in 3, 4 in 1, 4 in 2, 4 in 1 (unguided) steps at 32 x 32 pixels, 52 network samples in all, once"
        in log
    )
    assert json.loads((run.student / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == (
        "FlowMapEulerDiscreteScheduler"
    )
    rows = [json.loads(line) for line in (run.folder / "stats.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(8))
    assert [row["network"] for row in rows] == ["fake score", "student"] * 4
    assert "diversity" in rows[3] and "diversity" in rows[7]
    place = RunFolder(run.folder)
    assert sorted(file.name for file in run.folder.iterdir()) == [
        *("log.txt", "pictures", "recipe.yaml", "report.html", "report.json"),
        *("stats.jsonl", "status.json", "student", "work"),
    ]
    assert_usual_modes(run.folder)
    assert list(place.previews()) == [4, 8] and place.previews()[8].name == "000008.png"
    assert sorted(file.name for file in place.work.iterdir()) == ["README.txt", "checkpoints"]
    done = read_status(run.folder)
    assert done is not None and (done.state, done.update, done.updates) == ("done", 8, 8)
    assert run.report is not None and run.report.health is not None
    health = run.report.health
    assert done.health == health.verdict and not done.going and done.eta_seconds is None
    assert (rows[7]["teacher_diversity"], rows[7]["teacher_saturation"]) == pytest.approx(
        (health.teacher_diversity, health.teacher_saturation)
    )
    assert health.grad_norm == rows[7]["grad_norm"] and health.x_std == rows[7]["x_std"]
    assert rows[7].get("worries", []) == [worry.what for worry in health.worries if worry.update == 8]
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert recipe["options"]["fake_updates"] == 1 and recipe["options"]["score_times"] == [0.02, 0.98]
    with Image.open(place.samples) as picture:
        assert picture.width > 16 * 32
    report = json.loads((run.folder / "report.json").read_text())
    assert run.report is not None and read_report(run.folder) == run.report and report["schema"] == 1
    needed = (
        "suite n teacher student gap_closed train_seconds peak_memory_bytes command hardware commit versions"
    )
    assert set(needed.split()) <= set(report)
    assert report["against"] == "the teacher's pictures" and report["guidance"] == 2
    assert list(report["teacher"]["fd"]) == ["1", "2", "3"] and report["teacher"]["fd"]["3"] == 0
    assert report["student"]["fd"]["2"] > 0 and report["student"]["paired_rmse"]["2"] > 0
    assert "they are too few to hold some out" in report["remarks"][-1]
    again = measure_again(run.folder, output=tmp_path / "again")  # by the student's own pipeline
    assert again.student["fd"]["2"] == pytest.approx(report["student"]["fd"]["2"], abs=0.05)
    assert again.teacher == report["teacher"] and again.protocol == report["protocol"]
    assert read_report(tmp_path / "again").student == again.student and again.health == run.report.health
    with pytest.raises(UserError, match="--steps is 3, but this student draws in 2 steps"):
        measure_again(run.folder, [3])
    (row,) = rank([run.report])
    # Of 4 pictures the teacher's KID with one step is not told apart from 0.
    assert (row.fd, row.gap_closed, report["gap_closed"]) == (report["student"]["fd"]["2"], None, {})
    assert report["peak_memory_bytes"] > 2**26
    page = (run.folder / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 3 + 3 and "http" not in page
    )  # samples; two previews, the teacher
    assert "<b>healthy</b>" in page and "Loss of the fake score" in page and rows[0]["phase"] == "matching"
    assert "num_inference_steps=2" in (run.student / "README.md").read_text()


@pytest.mark.slow
def test_a_lora_run_is_exported_again_from_its_checkpoint_and_a_stock_pipeline_takes_its_adapter(
    tmp_path, prompts
):
    """`export` gives the very weights that the run itself exported, and they verify; the teacher's own folder with the
    adapter loaded draws the same pictures."""
    from diffusers import DiffusionPipeline, LCMScheduler
    from safetensors.torch import load_file

    teacher = saved("sd", tmp_path / "sd")
    (teacher / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nbase_model: some/body\n---\n"
    )
    (teacher / "LICENSE.md").write_text("Do as you like.")
    sets = [*SHORT, prompts, "train.updates=4", "train.average=0.5", "train.lr=1e-2", "student.lora_rank=2",
            "student.times=[1.0, 0.5]", "options.pairs=4", "options.pair_steps=2", "options.guidance=2"]  # fmt: skip
    wanted = load_recipe(teacher=str(teacher), method="lcm", sets=sets)
    run = run_recipe(wanted, output=tmp_path / "run", command=f"stepdistill train --output {tmp_path}/run")
    assert "drawn in 2 step(s) of" in run.report.verification
    assert_usual_modes(run.folder)
    measured = {
        "suite": "of a test",
        "n": 8,
        "metrics": {"fd": "FD", "clip_score": "CLIP"},
        "teacher": {"fd": {}},
        "student": {"fd": {"2": 1.5}},
    }
    report = run.report.model_copy(update=measured)
    RunFolder(run.folder).report.write_text(report.text())
    again = export_run(run.folder, tmp_path / "again")
    cards = [(folder / "README.md").read_text() for folder in (run.student, again)]
    for card in cards:
        assert card.startswith(
            "---\nlibrary_name: diffusers\nbase_model: some/body\nlicense: other\nlicense_name: mine"
        )
        assert "| trained with | `stepdistill train --output run` |" in card and report.health.line() in card
        prompt_file = tmp_path / "prompts.txt"
        assert f"| prompts | `prompts.txt`, 5, SHA-256 `{sha256_of(prompt_file)[:16]}` |" in card
        assert "![3](verification/3.png)" in card
        assert "| LoRA | rank 2, scale 1, `pytorch_lora_weights.safetensors` |" in card
        assert (
            'pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")'
            in card
        )
        assert (
            'pipe.scheduler = LCMScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")'
            in card
        )
    assert "| student | 2 | 1.500 |" in cards[1] and "| student | 2 | 1.500 |" not in cards[0]
    RunFolder(run.folder).report.write_text(report.model_copy(update={"student_sha256": "other"}).text())
    for name in ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        first, second = load_file(run.student / name), load_file(again / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert verify(again).images == 4
    alone = export_run(run.folder, tmp_path / "alone", ["export.what=adapter"])  # proves it, too
    assert not (alone / "unet").exists() and (alone / "pytorch_lora_weights.safetensors").is_file()
    assert "1.500" not in (alone / "README.md").read_text()  # what was measured is of other weights
    for folder in (run.student, again, alone):
        assert (folder / "LICENSE.md").read_text() == "Do as you like."
        texts = [file for file in folder.rglob("*") if file.suffix in (".json", ".md", ".txt")]
        assert len(texts) > 3 and not [file for file in texts if str(tmp_path) in file.read_text()]

    manifest = json.loads((run.student / "verification" / "manifest.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(teacher, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_pretrained(run.student, subfolder="scheduler")

    def far_from_the_trainers(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in manifest["seeds"]]
        images = pipe(**manifest["call"], generator=generators, output_type="pil").images
        ours = (Image.open(run.student / "verification" / f"{i}.png") for i in range(len(images)))
        pairs = zip(images, ours, strict=True)
        return max(high for a, b in pairs for _, high in ImageChops.difference(a, b).getextrema())

    assert far_from_the_trainers(pipe) > 8
    pipe.load_lora_weights(run.student, weight_name="pytorch_lora_weights.safetensors")
    assert far_from_the_trainers(pipe) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more", "steps"),
    [
        ("meanflow", ["options.tangent_warmup=0"], 1),
        ("dmf", [], 1),
        ("dmf", ["student.times=[1.0,0.5]", "student.lora_rank=2"], 2),
    ],
)
def test_a_run_with_a_second_time_ends_in_the_stock_class(method, more, steps, tmp_path, prompts):
    """On an eps teacher of a table: trained, folded, exported, verified in a fresh process."""
    teacher = saved("sd", tmp_path / "sd")
    sets = [*SHORT, prompts, "train.updates=3", "train.lr=1e-2", "options.pairs=4", "options.pair_steps=2",
            "options.guidance=2", *more]  # fmt: skip
    run = stepdistill.distill(teacher=teacher, method=method, output=tmp_path / "run", sets=sets)
    assert f"drawn in {steps} step(s) of" in run.report.verification
    config = json.loads((run.student / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel" and config["time_cond_proj_dim"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "times", "more"),
    [
        ("unet-ddim", "dmd", [0.626], ["options.warm_start=2", "options.pairs=4", "options.pair_steps=2"]),
        ("sd", "sid", [0.4, 0.2], ["options.guidance=2"]),
    ],
)
def test_a_student_that_starts_below_pure_noise_is_trained_exported_and_verified(
    name, method, times, more, tmp_path, prompts
):
    """The unconditional teacher also has DMD's default guidance, which is none where there is nothing to guide with."""
    teacher = saved(name, tmp_path / "teacher")
    sets = [*SHORT, *more, *([prompts] if name == "sd" else []), "train.updates=6", f"student.times={times}"]
    run = stepdistill.distill(teacher, method, tmp_path / "run", sets=sets)
    assert f"drawn in {len(times)} step(s) of" in run.report.verification
    config = json.loads((run.student / "scheduler" / "scheduler_config.json").read_text())
    assert config["num_train_timesteps"] == len(config["trained_betas"]) == round(1000 * times[0])


def test_a_start_below_pure_noise_is_refused_where_trajectories_are_learnt(tmp_path, prompts):
    match = r"student.times starts at 0\.4, but lcm learns from what starts as pure noise: set 1\.0"
    refused(tmp_path, match, prompts, "student.times=[0.4]", method="lcm")


def test_a_pipeline_object_and_classes_need_no_prompts(tmp_path):
    """A class-conditional teacher given as an object learns from its own class numbers."""
    sets = [*SHORT, "train.updates=4", "options.pairs=4", "options.pair_steps=2", "options.reflow_updates=2",
            "options.guidance=1"]  # fmt: skip
    run = stepdistill.distill(tiny_pipeline("unet-classes"), "reflow", tmp_path / "run", sets=sets)
    assert "differ from the trainer's by" in run.report.verification
    index = json.loads((run.student / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"


def refused(tmp_path, match, *sets, teacher="sd", method="dmd", **more):
    folder = tmp_path / "teacher"
    if not folder.exists():
        saved(teacher, folder)
    with pytest.raises(UserError, match=match):
        stepdistill.distill(folder, method, tmp_path / "run", sets=[*SHORT, *sets], **more)
    assert not (tmp_path / "run" / "work" / "checkpoints").exists()


@pytest.mark.own_process
def test_a_proof_that_takes_too_long_is_told_and_the_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stepdistill.export.verify.LONGEST", 1e-9)
    sets = [*SHORT, "train.updates=2", "options.guidance=1"]
    distilled = stepdistill.distill(tiny_pipeline("unet-classes"), "dmd", tmp_path / "run", sets=sets)
    said = "not verified: .*student: plain diffusers had not drawn its pictures again after 1e-09 hours"
    assert re.match(said, distilled.report.verification) and RunFolder(tmp_path / "run").report.is_file()
    assert re.search(f"warning: {said}", capsys.readouterr().err)


def test_a_teacher_that_draws_from_prompts_needs_prompts(tmp_path):
    refused(tmp_path, "give a text file with one a line in data.prompts")


def test_what_compares_samples_of_a_prompt_needs_several(tmp_path, prompts):
    refused(
        tmp_path, "crd compares samples of one prompt, and train.group is 1: set it", prompts, method="crd"
    )


def test_a_student_of_few_steps_is_no_teacher_of_what_noises_images(tmp_path, prompts):
    folder = saved("sd", tmp_path / "teacher") or tmp_path / "teacher"
    (folder / "verification").mkdir()
    call = {"num_inference_steps": 4, "guidance_scale": 0.0}
    (folder / "verification" / "manifest.json").write_text(json.dumps({"call": call}))
    match = r"crd noises images .* few steps \(its folder says that it draws in 4\), cannot: take the student's own"
    refused(tmp_path, match, prompts, "train.group=2", method="crd")


def test_a_rate_of_frames_is_of_videos(tmp_path, prompts):
    refused(tmp_path, "data.fps is 8, but .* draws pictures: leave it out", prompts, "data.fps=8")


def test_a_gan_needs_images(tmp_path, prompts):
    refused(
        tmp_path,
        "learns from images: give a folder in data.images",
        prompts,
        "options.adversarial_weight=0.1",
    )


@pytest.mark.slow
def test_a_teacher_of_videos_is_distilled_with_videos_and_refuses_images(tmp_path, prompts):
    """A discriminator on its network's features tells its student's videos from those of a folder."""
    images, videos = tmp_path / "images", tmp_path / "videos"
    images.mkdir()
    videos.mkdir()
    Image.new("RGB", (16, 16)).save(images / "picture.png")
    for name in ("a dog", "a tree"):
        moving = [Image.new("RGB", (32, 16), (40 * i, 90, 20)) for i in range(6)]
        save_video(videos / f"{name}.mp4", [moving], 8)
    more = [
        "options.adversarial_weight=0.1",
        "options.warm_start=0",
        "options.pair_weight=0",
        "train.updates=3",
    ]
    wanted = ["data.buckets=true", f"data.images={videos}"]
    more += [prompts, "data.size=[16, 32, 5]", "data.fps=8", "options.fake_updates=1"]
    refused(
        tmp_path, "holds no video of .*, and the teacher draws videos",
        *more, f"data.images={images}", teacher="wan",
    )  # fmt: skip
    refused(tmp_path, "data.buckets is true, but .* draws videos", *wanted, *more, teacher="wan")
    sets = [*SHORT, *more, f"data.images={videos}"]
    recipe = load_recipe(teacher=str(saved("wan", tmp_path / "wan")), method="dmd", sets=sets)
    run = run_recipe(recipe, output=tmp_path / "run", command="stepdistill train")
    assert run.report is not None and re.search("by [01]/255 at most", run.report.verification)
    rows = [json.loads(line) for line in (run.folder / "stats.jsonl").read_text().splitlines()]
    assert any("discriminator" in key for row in rows for key in row), rows
    assert (
        "2 videos, captions: 2 from their file names; the middle 5 frames of each, 8 frames a second"
        in (run.folder / "log.txt").read_text()
    )


def test_guidance_needs_an_unconditional_mode(tmp_path):
    refused(tmp_path, "has no unconditional mode: set 1", "options.guidance=3", teacher="unet-ddpm")


def test_what_cannot_be_exported_is_told():
    """A scheduler that reads the student's eps as v draws another picture than the trainer."""
    teacher = tiny_teacher("unet-ddim")
    student = Student.from_teacher(teacher)
    sampler = on_stock_grid(Sampler((1.0,), renoise=True), student.path, teacher.pipe.scheduler)
    check_export(student, sampler, teacher, "0")
    with pytest.raises(UserError, match=r"could not be exported, so nothing was trained: \w+ draws"):
        check_export(student, replace(sampler, prediction_type="v_prediction"), teacher, "0")


def test_times_that_no_stock_scheduler_draws_are_refused(tmp_path, prompts):
    refused(tmp_path, r"student.times is \[1.0, 0.3\]", prompts, "student.times=[1.0, 0.3]")


def test_xformers_is_refused_with_its_reason(tmp_path, prompts):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(tmp_path, "train.attention is xformers, but xformers", prompts, "train.attention=xformers")


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, prompts):
    refused(tmp_path, "train.tracker is nosuch, which is not installed", prompts, "train.tracker=nosuch")


def test_a_batch_that_does_not_split_is_refused(tmp_path, prompts):
    refused(tmp_path, "batch", prompts, "train.batch=6", "train.accumulate=4")


def test_an_unknown_family_is_named_before_a_weight_is_read(tmp_path, prompts):
    folder = tmp_path / "teacher"
    saved("sd", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "AudioPipeline"}))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(tmp_path, "no family for AudioPipeline. There are: .*SDXL.*own_family", prompts)
