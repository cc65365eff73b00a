"""Flow maps of every kind of network: trained, folded into the stock class, exported and verified."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import SIZES, VIDEO, WITH_TEXT, tiny_pipeline

import stepdistill

COMMON = [
    *("train.batch=2", "train.updates=2", "train.lr=1e-2", "train.average=0", "train.preview_every=0"),
    *("evaluate=false", "student.output=teacher", "options.guidance=2"),
]
METHODS = {
    "meanflow": [
        "options.pairs=2",
        "options.pair_steps=2",
        "options.tangent_warmup=0",
        "options.derivative=exact",
    ],
    "dmf": ["options.pairs=2", "options.pair_steps=2", "options.derivative=exact"],
    "self_e": ["options.pairs=2", "options.pair_steps=2", "options.auxiliary_after=0"],
    "twinflow": ["options.pairs=2", "options.pair_steps=2"],
    "ayf": [
        "options.pairs=2",
        "options.pair_steps=2",
        "options.tangent_warmup=0",
        "options.derivative=exact",
    ],
    "anyflow": ["options.pairs=2", "options.pair_steps=2", "options.counts=[1,2]"],
    "freeflow": ["options.fake_updates=1", "options.fake_warm_start=0", "options.derivative=exact"],
}


def sets_of(name: str, method: str, folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("red apple\ndog\ncat face\n")
    size, sets = SIZES.get(name), [*COMMON, *METHODS[method]]
    if name in WITH_TEXT:
        sets.append(f"data.prompts={folder / 'prompts.txt'}")
    if size:
        sides = [size.height, size.width, size.frames][: 3 if name in VIDEO else 2]
        sets.append(f"data.size={sides}")
    return sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("dit", "meanflow", 2),
        ("sd3", "freeflow", 2),
        ("flux", "meanflow", 2),
        ("sd3", "self_e", 2),
        ("wan", "anyflow", 3),
        ("sd3", "ayf", 3),
        ("sana", "twinflow", 1),
        ("sana", "freeflow", 1),
        ("wan", "meanflow", 3),
        ("dit", "dmf", 2),
    ],
)
def test_transformers_become_flow_maps_and_stock_students(
    name: str, method: str, steps: int, tmp_path: Path
) -> None:
    """Two updates with exact derivatives; one step and several end in the teacher's class and config."""
    times = {1: [1.0], 2: [1.0, 0.5], 3: [1.0, 0.923, 0.75]}[steps]
    sets = [*sets_of(name, method, tmp_path), f"student.times={times}"]
    teacher = tiny_pipeline(name)
    run = stepdistill.distill(teacher, method, tmp_path / "run", sets=sets)
    assert f"drawn in {steps} step(s) of" in run.report.verification
    config = json.loads((run.student / "transformer" / "config.json").read_text())
    assert config["_class_name"] == type(teacher.transformer).__name__
    kind = json.loads((run.student / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    of_tables = {1: "LCMScheduler", 2: "DDIMScheduler"}
    flow = "FlowMatchEulerDiscreteScheduler" if name == "flux" else "FlowMapEulerDiscreteScheduler"
    assert kind == (of_tables[steps] if name == "dit" else flow)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("unet-classes", 0), ("sd3", 2)])
def test_classes_and_adapters_leave_room_for_a_second_time(name: str, rank: int, tmp_path: Path) -> None:
    """A LoRA's slot is merged and folded with it; no file of the adapter alone could say what it adds."""
    sets = [*sets_of(name, "freeflow", tmp_path), f"student.lora_rank={rank}", "student.times=[1.0]"]
    sets += ["options.guidance=1"] if name == "unet-classes" else []
    run = stepdistill.distill(tiny_pipeline(name), "freeflow", tmp_path / "run", sets=sets)
    assert "drawn in 1 step(s) of" in run.report.verification
    assert not (run.student / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
def test_a_folder_in_bfloat16_says_what_was_saved(tmp_path: Path) -> None:
    """Where there is no bias, folding changes weights, which are rounded once more: the proof is of those."""
    teacher = tiny_pipeline("klein")
    teacher.transformer.to(torch.bfloat16)
    sets = [*sets_of("klein", "freeflow", tmp_path), "student.times=[1.0, 0.5]"]
    run = stepdistill.distill(teacher, "freeflow", tmp_path / "run", sets=sets)
    mean = re.search(r"by (\d)/255 at most, (\S+)/255 on average", run.report.verification)
    assert mean is not None and float(mean[2]) < 0.01


def test_the_recipe_for_dit_runs_on_a_tiny_one(tmp_path: Path) -> None:
    """Both networks have their update, the student that of its v; the rest of the recipe is as it stands."""
    sets = [
        "train.updates=2",
        "train.batch=2",
        "train.accumulate=1",
        "train.preview_every=0",
        "evaluate=false",
    ]
    sets += ["student.output_updates=1", "student.output_samples=2"]
    run = stepdistill.distill(tiny_pipeline("dit"), None, tmp_path / "run", recipe="freeflow_dit", sets=sets)
    assert "drawn in 1 step(s) of" in run.report.verification
    rows = [json.loads(line) for line in (run.folder / "stats.jsonl").read_text().splitlines()]
    assert [row["network"] for row in rows] == ["fake score", "student"]
