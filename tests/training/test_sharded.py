"""Networks of which two processes hold a part each: the run is that of one process, and what it leaves is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from run_toy import COMMON, HERE, METHODS
from safetensors.torch import load_file

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.log import read_stats
from stepdistill.training.assemble import assemble, training_data
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.distil import run_recipe
from stepdistill.training.identity import resolve, resolved_yaml
from stepdistill.training.loop import train

RUNS = {
    # A follower with a discriminator on its features; a target that averages, and a term's critic; adapters on one
    # network, and a flow that becomes the student; a second phase, in which the follower starts anew.
    "dmd": [*METHODS["dmd"], "options.gan_weight=0.01"],
    "lcm": [*METHODS["lcm"], "terms.gan_weight=0.01", "student.times=[1.0, 0.5]"],
    "reflow lora": [*METHODS["reflow"], "options.reflow_steps=2", "student.lora_rank=2"],
    "phased_dmd": ["student.times=[1.0, 0.5]", "options.phase_updates=1", "options.fake_steps=1"],
}
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from accelerate import Accelerator
from test_sharded import RUNS, loop, recipe_of
from stepdistill.system.processes import launched
from stepdistill.training.distil import run_recipe
from stepdistill.training.parallel import parallel_of
root, processes = Path(sys.argv[3]), launched()
folder = root / "two"
assert processes.count == 2
for name in RUNS:  # checkpointing here and not in one process: it changes no number
    recipe = recipe_of(name, root, "train.checkpointing=true")
    loop(recipe, folder / name, parallel_of("sharded", processes, Accelerator(cpu=True).device))
sets = ("train.parallel=sharded", "train.sheet_every=2", "train.checkpointing=true")
run_recipe(recipe_of("dmd", root, *sets), output=folder / "resumed", resume=True)
processes.part()
"""


def recipe_of(name, root, *more):
    """The run of RUNS whose first word is its method, on the real images of ``root``."""
    every = 2 if name == "dmd" else 4
    more = (f"data.images={root / 'images'}", *more)
    sets = [*COMMON, "train.steps=4", f"train.checkpoint_every={every}", "student.output=teacher"]
    return load_recipe(HERE / "empty.yaml", method=name.split()[0], sets=[*sets, *RUNS[name], *more])


def loop(recipe, folder, parallel=None, resume=False):
    """A run without its end."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator)
    return train(
        job.objective,
        training_data(job, folder),
        recipe,
        folder,
        accelerator,
        parallel=parallel,
        resume=resume,
    )


def cut(run, to):
    """What the run had left at step 2."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-00000004")


def assert_equal(one, two):
    for a, b in zip(read_stats(one), read_stats(two), strict=True):
        assert a["turn"] == b["turn"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    first, second = (checkpoints_in(run / "checkpoints")[-1] for run in (one, two))
    files = sorted(file.name for file in first.glob("*.safetensors"))
    assert files == sorted(file.name for file in second.glob("*.safetensors")) and "ema.safetensors" in files
    for file in files:
        ours, theirs = load_file(first / file), load_file(second / file)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        if not file.startswith("optimizer"):
            apart = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in ours)
            size = sum(float(value.double().square().sum()) for value in ours.values())
            assert apart**0.5 < 1e-4 * size**0.5, file


@pytest.mark.slow
def test_two_processes_that_share_their_networks_are_one(tmp_path):
    """Curves and checkpoints of every kind of network; a checkpoint of one process is gone on with by two, down to
    sheets and an exported and verified student, and one of two processes by one."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        image = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(tmp_path / "images" / f"picture {i}.png")
    for name in RUNS:
        loop(recipe_of(name, tmp_path), tmp_path / "one" / name)
    cut(tmp_path / "one" / "dmd", tmp_path / "two" / "resumed")
    (tmp_path / "two" / "resumed" / "recipe.yaml").write_text(
        resolved_yaml(resolve(recipe_of("dmd", tmp_path)))
    )
    script = tmp_path / "two.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29523"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(HERE), str(HERE.parent / "training"), str(tmp_path)],
        capture_output=True, text=True, timeout=400, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-2000:]
    cut(tmp_path / "two" / "dmd", tmp_path / "one" / "resumed")
    loop(recipe_of("dmd", tmp_path), tmp_path / "one" / "resumed", resume=True)
    for run in (
        *(tmp_path / "two" / name for name in RUNS),
        *(tmp_path / n / "resumed" for n in ("one", "two")),
    ):
        assert_equal(tmp_path / "one" / ("dmd" if run.name == "resumed" else run.name), run)
    ended = tmp_path / "two" / "resumed"
    assert (ended / "sheets" / "step-00000004.png").is_file() and (ended / "report.json").is_file()
    average = load_file(checkpoints_in(ended / "checkpoints")[-1] / "ema.safetensors")
    student = load_file(ended / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: value.shape for name, value in student.items()} == {
        name: value.shape for name, value in average.items() if name != "updates"
    }
    assert all(torch.equal(value, average[name]) for name, value in student.items())


def test_a_method_that_calls_its_networks_for_some_samples_alone_is_refused(tmp_path):
    recipe = load_recipe(HERE / "empty.yaml", method="meanflow", sets=["train.parallel=sharded"])
    with pytest.raises(UserError, match=r"train\.parallel is sharded, but meanflow calls"):
        run_recipe(recipe, output=tmp_path / "run")
