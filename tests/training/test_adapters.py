"""Whole runs in which student, fake network and target are adapters on the teacher's network."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_prompts
from torch import Tensor

from stepdistill.export.verify import verify
from stepdistill.networks.averages import Ema
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.pictures import teacher_pictures
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.exporting import export_student
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.run_report import Start
from stepdistill.training.training_data import training_data


class Killed(Exception):
    pass


def kill_at_3(step: int, ema: Ema | None) -> Seen:
    if step == 3:
        raise Killed
    return Seen({}, [])


def recipe_of(folder: Path, name: str, method: str, *more: str) -> Recipe:
    """Six steps of a method with LoRA on a tiny pipeline, saved beside its prompts."""
    teacher, prompts = folder / name, folder / "prompts.txt"
    if not teacher.exists():
        tiny_pipeline(name).save_pretrained(teacher)
        prompts.write_text("\n".join(tiny_prompts(name, 4)))
    sets = [
        *(
            "student.lora_rank=2",
            "student.output=teacher",
            "train.updates=6",
            "train.batch=4",
            "train.lr=1e-2",
        ),
        *("train.average=0.5", "train.checkpoint_every=2", "train.preview_every=1", "evaluate=false"),
        *(f"data.prompts={prompts}", "options.guidance=2.0", "student.times=[1.0, 0.5]", *more),
    ]
    return load_recipe(HERE / "empty.yaml", method=method, teacher=str(teacher), sets=sets)


def start(
    recipe: Recipe,
    folder: Path,
    resume: bool = False,
    preview: Callable[[int, Ema | None], Seen] | None = None,
) -> Assembled:
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, None)
    data = training_data(job, folder)
    train(job.objective, data, recipe, folder, accelerator, resume=resume, preview=preview)
    return job


def kept(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint."""
    files = sorted(checkpoints_in(folder / "work" / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


DMD = ("options.fake_updates=1", "options.fake_lora_rank=3")
RUNS = {
    "sd": ("sd", "dmd", *DMD),
    "sd3": ("sd3", "dmd", *DMD),
    "sd in bf16": ("sd", "dmd", *DMD, "train.precision=bf16"),
    "phases": (
        "sd",
        "phased_dmd",
        "options.fake_updates=1",
        "options.phase_updates=1",
        "train.precision=bf16",
    ),
    "target": ("sd", "lcm", "options.pairs=4", "options.pair_steps=2"),
    "flow": (
        "sd",
        "reflow",
        "options.pairs=4",
        "options.pair_steps=2",
        "options.reflow_updates=3",
        "options.fresh=1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_adapters_train_resume_exactly_and_are_exported(run: str, tmp_path: Path) -> None:
    """Every role moves; a kill between two checkpoints changes nothing; no checkpoint holds a weight of the teacher's,
    which are those of its files at the end; the exported folder verifies."""
    name, method, *more = RUNS[run]
    recipe = recipe_of(tmp_path, name, method, *more)
    job = start(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        start(recipe, tmp_path / "parts", preview=kill_at_3)
    start(recipe, tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)

    roles = job.method.roles
    weights = {key for key in whole if key.startswith("roles.")}
    assert weights == {f"roles.{role}.{key}" for role in roles.names for key in roles.weights(role)}
    assert {role for role in roles.names for key in weights if key.startswith(f"roles.{role}.")
            and ".lora_B." in key and bool(whole[key].any())} == set(roles.names)  # fmt: skip
    assert all(".lora_" in key for key in whole if key.startswith("ema.") and key != "ema.updates")
    (net,) = roles.stored().values()
    part = job.teacher.family.network
    files = load_file(tmp_path / name / part / "diffusion_pytorch_model.safetensors")
    base = {key.replace(".base_layer.", "."): v for key, v in net.state_dict().items() if ".lora_" not in key}
    low = torch.bfloat16 if "train.precision=bf16" in more else torch.float32
    assert {value.dtype for value in base.values()} <= {torch.float32, low}
    assert all(torch.equal(value.float(), files[key].to(value.dtype).float()) for key, value in base.items())

    export_student(job, tmp_path / "student", [Start(command="none")])
    assert verify(tmp_path / "student").worst <= 1
    if run != "phases":
        made = load_file(tmp_path / "student" / part / "diffusion_pytorch_model.safetensors")
        deltas = {f"{key}.weight": each.get_delta_weight("student") for key, each in lora_layers(net).items()}
        for key, value in made.items():  # of the file's own weights, never of rounded ones
            torch.testing.assert_close(value, files[key] + deltas.get(key, 0.0), atol=1e-6, rtol=1e-6)
        assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()]
    assert len(rows) == 6


def test_a_bf16_student_on_a_float32_teacher_shares_a_float32_network(tmp_path: Path) -> None:
    """Each role's own call says whose arithmetic is bf16; the weights are held for the one that needs more."""
    found = {}
    for own, theirs in (("bf16", "float32"), ("float32", "bf16"), ("float32", "float32")):
        more = (f"train.precision={own}", f"train.teacher_precision={theirs}")
        job = assemble(resolve(recipe_of(tmp_path, "sd", "dmd", *DMD, *more)), Accelerator(cpu=True), None)
        assert {value.dtype for value in job.teacher.denoiser.net.parameters()} == {torch.float32}
        x = torch.randn(2, *job.teacher.codec.shape, generator=torch.Generator().manual_seed(0))
        at = (x, torch.tensor([0.9, 0.4]), job.teacher.codec.encode(job.prompts[:2]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=own == "bf16"):
            found[own, theirs] = job.student.raw(*at), job.teacher.denoiser.raw(*at)
    student, teacher = found["bf16", "float32"]
    other, low = found["float32", "bf16"]
    exact = found["float32", "float32"][0]
    assert torch.equal(teacher, exact) and torch.equal(other, exact)
    assert torch.equal(student, low) and not torch.equal(student, exact)


@pytest.mark.parametrize(("name", "more"), [("sd", []), ("wan-2.2", ["data.size=[32, 16, 9]"])])
def test_adapters_can_be_all_that_holds_the_networks_tensors(
    name: str, more: list[str], tmp_path: Path
) -> None:
    """As where processes share them out, and any network beside them would keep each tensor whole: in a run the
    teacher's own network is gone, and its pipeline has the one with the adapters, which draws as before."""
    job = assemble(resolve(recipe_of(tmp_path, name, "dmd", *more)), Accelerator(cpu=True), None)
    roles, pipe = job.method.roles, job.teacher.pipe
    stretches = list(job.teacher.family.stretches(pipe))
    networks = [weakref.ref(getattr(pipe, each)) for each in stretches]
    prompts, seeds = job.prompts[:2], [0, 1]
    before = teacher_pictures(job.teacher, prompts, seeds, 2, 2.0)
    roles.hold_alone()
    gc.collect()
    assert [each() for each in networks] == [None] * len(stretches)
    assert torch.equal(before, teacher_pictures(job.teacher, prompts, seeds, 2, 2.0))
    assert lora_layers(getattr(job.teacher.codec.pipe, stretches[0]))
