"""Networks of which several processes hold a part each: the run is that of one process, and what it leaves is whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from run_toy import COMMON, HERE, METHODS
from safetensors.torch import load_file
from small_images import pictures
from tiny import tiny_pipeline, tiny_teacher

from stepdistill.errors import UserError
from stepdistill.export.verify import verify
from stepdistill.networks.shared_tokens import check_shared_tokens, check_split
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.log import read_stats
from stepdistill.system.processes import launched
from stepdistill.training import checkpoint, finish
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import checkpoints_in, load_checkpoint
from stepdistill.training.distil import run_recipe
from stepdistill.training.identity import resolve, resolved_yaml
from stepdistill.training.launcher import as_launched
from stepdistill.training.loop import train
from stepdistill.training.parallel import parallel_of
from stepdistill.training.training_data import training_data

RUNS = {
    # A follower with a discriminator on its features; the same as three adapters on one network; a target that averages
    # and a term's critic; a flow that becomes the student; a second phase, in which the follower starts anew.
    "dmd": [*METHODS["dmd"], "options.adversarial_weight=0.01"],
    "dmd lora": [*METHODS["dmd"], "options.adversarial_weight=0.01", "student.lora_rank=2"],
    "lcm": [*METHODS["lcm"], "terms.gan_weight=0.01", "student.times=[1.0, 0.5]"],
    "reflow": [*METHODS["reflow"], "options.reflow_updates=2"],
    "phased_dmd lora": [
        *(
            "student.times=[1.0, 0.5]",
            "options.phase_updates=1",
            "options.fake_updates=1",
            "student.lora_rank=2",
        )
    ],
    # Its calls are shared.
    "dmd video": ["student.times=[1.0, 0.5]", "options.fake_updates=1", "data.size=[32, 16, 9]"],
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
"""What ``accelerate launch`` hands on of a config of FSDP2."""

PROGRAM = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_sharded
for name in ("sd", "wan"):  # what they import is imported once
    test_sharded.tiny_pipeline(name)
root, children = Path(sys.argv[3]), []
for rank in range(3):
    children.append(os.fork())
    if not children[-1]:
        break
else:
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
    sys.exit()
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
if rank != 2:
    test_sharded.in_two(root)
test_sharded.in_three(root)
test_sharded.killed_while_saving(root)
"""


def recipe_of(name, root, *more):
    """The run of RUNS whose first word is its method, on the real images of ``root``."""
    sets = [*COMMON, *RUNS[name], "train.batch=6", "train.updates=4", "student.output=teacher"]
    sets += [f"train.checkpoint_every={2 if name == 'dmd' else 4}", f"data.images={root / 'images'}", *more]
    return load_recipe(HERE / "empty.yaml", method=name.split()[0], sets=sets)


def loop(recipe, folder, parallel=None, resume=False):
    """A run without its end."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, tiny_pipeline("wan" if recipe.data.size else "sd"))
    data = training_data(job, folder)
    return train(job.objective, data, recipe, folder, accelerator, parallel=parallel, resume=resume)


def sharded(count, port):
    """The first ``count`` processes, in place of another group."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.update(WORLD_SIZE=str(count), MASTER_PORT=str(port))
    group = launched()
    assert group.count == count
    return lambda: parallel_of("sharded", group, group.device)


def in_two(root):
    """All runs; of one process's checkpoint the whole run, as an accelerate config shards it."""
    parallel = sharded(2, 29523)
    for name in list(RUNS)[:-1]:  # checkpointing here and not in one process: it changes no number
        loop(recipe_of(name, root, "train.checkpointing=true"), root / "two" / name, parallel())
    recipe = recipe_of("dmd video", root, "train.checkpointing=true", "train.context_parallel=2")
    loop(
        recipe, root / "two" / "dmd video", parallel_of("auto", parallel().processes, torch.device("cpu"), 2)
    )
    os.environ.update(FSDP, FSDP_RESHARD_AFTER_FORWARD="false")
    recipe = recipe_of("dmd", root, "train.preview_every=1", "train.checkpointing=true")
    finish.verify = str  # the test does it, where it costs less
    run_recipe(recipe, output=root / "two" / "resumed", resume=True, pipeline=tiny_pipeline("sd"))
    for name in FSDP:
        del os.environ[name]


def in_three(root):
    """Runs, and a checkpoint of two processes gone on with, a part of which was damaged and put back."""
    parallel = sharded(3, 29524)
    for name in ("dmd", "dmd lora"):
        loop(recipe_of(name, root), root / "three" / name, parallel())
    processes, resumed = parallel().processes, root / "three" / "resumed"
    if processes.main:
        cut(root / "two" / "dmd", resumed)
        part = last(resumed) / "roles-00002-of-00002.safetensors"
        whole = part.read_bytes()
        part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    processes.gather(None)
    # One of them reads it, and all end with its name.
    with pytest.raises(UserError, match=r"damaged: roles-00002-of-00002\.safetensors"):
        loop(recipe_of("dmd", root), resumed, parallel(), resume=True)
    processes.gather(None)
    if processes.main:
        part.write_bytes(whole)
    processes.gather(None)
    loop(recipe_of("dmd", root), resumed, parallel(), resume=True)


def killed_while_saving(root):
    """The main process, when the parts of step 4 are written and not yet listed."""
    write, parallel = checkpoint.write_parts, sharded(3, 29525)()
    if parallel.main:
        cut(root / "three" / "dmd", root / "killed")
    parallel.processes.gather(None)

    def then_killed(folder, groups):
        files = write(folder, groups)
        if parallel.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    checkpoint.write_parts = then_killed
    with pytest.raises(RuntimeError):  # the others' connection is closed
        loop(recipe_of("dmd", root), root / "killed", parallel, resume=True)
    os._exit(0)


def cut(run, to):
    """What the run had left at step 2."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "work" / "checkpoints" / "step-00000004")


def last(run):
    return checkpoints_in(run / "work" / "checkpoints")[-1]


def assert_equal(one, two):
    for a, b in zip(read_stats(one), read_stats(two), strict=True):
        assert a["network"] == b["network"]
        # A matched field is a small difference of two predictions.
        rel = 1e-4 if "video" in two.name else 1e-5
        assert a["loss"] == pytest.approx(b["loss"], rel=rel), (two, a["update"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), (two, a["update"])
    (ours, _), (theirs, _) = load_checkpoint(last(one)), load_checkpoint(last(two))
    assert ours.keys() == theirs.keys() and "ema" in ours
    for part in ours.keys() - {"health"}:  # numbers in digits
        assert {k: v.shape for k, v in ours[part].items()} == {k: v.shape for k, v in theirs[part].items()}
        if not part.startswith("optimizer"):
            apart = sum(
                float((v.double() - theirs[part][k].double()).square().sum()) for k, v in ours[part].items()
            )
            size = sum(float(value.double().square().sum()) for value in ours[part].values())
            assert apart**0.5 < 1e-4 * size**0.5, (two, part)


@pytest.mark.slow
def test_two_and_three_processes_that_share_their_networks_are_one(tmp_path):
    """Curves and checkpoints of every kind of network, and of one whose calls two share. A checkpoint of one process
    is gone on with by two, down to sheets and an exported and verified student; one of two by three; and of three,
    killed while they saved the next one, by one."""
    pictures(tmp_path / "images", 8, 16)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    loop(recipe_of("dmd", tmp_path), one / "dmd")
    cut(one / "dmd", two / "resumed")
    (two / "resumed" / "recipe.yaml").write_text(resolved_yaml(resolve(recipe_of("dmd", tmp_path))))
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(HERE), str(HERE.parent / "training"), str(tmp_path)]
    common = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "3",
    }
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **common}
    )
    for name in list(RUNS)[1:]:
        loop(recipe_of(name, tmp_path), one / name)
    codes, said = started.communicate(timeout=600)
    assert codes.splitlines()[-1].split() == [str(-signal.SIGKILL), "0", "0"], said[-6000:]

    killed = tmp_path / "killed"
    assert last(killed).name == "step-00000002"
    assert list((killed / "work" / "checkpoints" / ".step-00000004.part").rglob("*.safetensors"))
    loop(recipe_of("dmd", tmp_path), killed, resume=True)
    runs = [*(two / name for name in RUNS), three / "dmd", three / "dmd lora"]
    for run in (*runs, two / "resumed", three / "resumed", killed):
        assert_equal(one / (run.name if run in runs else "dmd"), run)

    # Every process wrote a part, and no more than its share.
    parts = [load_file(file) for file in sorted(last(three / "dmd").glob("roles-*"))]
    sizes = [sum(value.numel() for value in part.values()) for part in parts]
    assert len(sizes) == 3 and max(sizes) < 0.4 * sum(sizes)
    # What a network in parts leaves is whole, and the averaged weights.
    ended = two / "resumed"
    assert (ended / "pictures" / "000004.png").is_file() and (ended / "report.json").is_file()
    verify(ended / "student")
    average = load_checkpoint(last(ended))[0]["ema"]
    student = load_file(ended / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: value.shape for name, value in student.items()} == {
        name: value.shape for name, value in average.items() if name != "updates"
    }
    assert all(torch.equal(value, average[name]) for name, value in student.items())
    # A part that is not there is named.
    lost = "roles-00002-of-00002.safetensors"
    (last(two / "lcm") / lost).unlink()
    with pytest.raises(UserError, match=f"lacks {re.escape(lost)}"):
        load_checkpoint(last(two / "lcm"))


def test_a_method_that_calls_its_networks_for_some_samples_alone_is_refused(tmp_path):
    recipe = load_recipe(HERE / "empty.yaml", method="meanflow", sets=["train.parallel=sharded"])
    with pytest.raises(UserError, match=r"train\.parallel is sharded, but meanflow calls"):
        run_recipe(recipe, output=tmp_path / "run")


def test_an_fsdp2_config_is_train_parallel_sharded(monkeypatch):
    """And what it asks for that is not done, or that the recipe contradicts, is refused with what to set."""

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = [
        "--config_file",
        str(HERE.parents[1] / "train" / "distributed" / "gpus_sharded.yaml"),
        "distill.py",
    ]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    shipped = prepare_multi_gpu_env(arguments)
    assert FSDP.items() <= shipped.items()

    def launch(*sets, **environment):
        with monkeypatch.context() as launcher:
            for name, value in {**shipped, "WORLD_SIZE": "2", **environment}.items():
                launcher.setenv(name, value)
            return as_launched(load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)).train.parallel

    assert launch() == launch("train.precision=bf16", ACCELERATE_MIXED_PRECISION="bf16") == "sharded"
    assert launch(WORLD_SIZE="1") == "auto"
    for found, sets, environment in (
        ("fsdp_version 1: set fsdp_version: 2", (), {"FSDP_VERSION": "1"}),
        ("fsdp_offload_params: true", (), {"FSDP_OFFLOAD_PARAMS": "true"}),
        ("set train.checkpointing=true", (), {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        ("mixed_precision: bf16, and train.precision is float32", (), {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("parallel is replicated, but", ("train.parallel=replicated",), {}),
        ("adafactor and parallel is sharded", ("train.optimizer=adafactor",), {}),
    ):
        with pytest.raises(UserError, match=found):
            launch(*sets, **environment)


def test_calls_are_shared_of_networks_alone_that_diffusers_can_split():
    wan, ltx, sd = (tiny_pipeline(name) for name in ("wan", "ltx", "sd"))
    check_shared_tokens(wan.transformer, 2)
    for net, share, found in (
        (wan.transformer, 3, "which does not divide the 2 heads of a WanTransformer3DModel"),
        (ltx.transformer, 2, "no plan that splits a LTXVideoTransformer3DModel's tokens"),
        (sd.unet, 2, "no plan that splits a UNet2DConditionModel's tokens"),
    ):
        with pytest.raises(UserError, match=found):
            check_shared_tokens(net, share)


def test_calls_that_cannot_be_shared_are_refused_before_training(tmp_path):
    """Tokens that do not divide, of states, and of prompts, where the network has theirs apart; and heads."""
    shared = [*COMMON, *RUNS["dmd video"], "train.context_parallel=2"]
    for more, found in (
        (
            ["data.size=[16, 16, 9]"],
            "not divide the 3 tokens that a WanTransformer3DModel has in .* at 16x16, 9 frames",
        ),
        (
            ["data.size=[32, 16, 1]", "options.adversarial_weight=0.01", f"data.images={tmp_path}"],
            "context_parallel is 2, .* but fake trains a head",
        ),
    ):
        recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=[*shared, *more])
        with pytest.raises(UserError, match=found):
            assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("wan"))
    flux, qwen = tiny_teacher("flux"), tiny_teacher("qwen-image")
    check_split(flux, 2, [flux.size], "a cat")
    with pytest.raises(UserError, match=r"which does not divide the 133 tokens .* in pos_embed"):
        check_split(qwen, 2, [qwen.size], "a cat")


def test_the_slurm_script_starts_one_launcher_a_node(tmp_path):
    """With stand-ins for what it starts: every node gets its rank, and all of them the first one's address."""
    for name, lines in {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": 'shift\nfor rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
        "accelerate": 'printf "%s|" "$@"\necho',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    script = HERE.parents[1] / "train" / "distributed" / "slurm.sh"
    run = tmp_path / "runs" / "a"
    for resumed in ("", "--resume|"):
        said = subprocess.run(
            [str(script), "my recipe.yaml", "--output", str(run)],
            env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.splitlines() == [
            "launch|--config_file|train/distributed/two_nodes.yaml|--num_machines|2|--num_processes|16|--machine_rank|"
            f"{rank}|--main_process_ip|node7|-m|stepdistill|train|my recipe.yaml|--output|{run}|{resumed}"
            for rank in (0, 1)
        ]
        checkpoint = run / "work" / "checkpoints" / "step-00000005"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text("{}")


def test_a_job_whose_time_is_over_is_queued_again(tmp_path):
    """Slurm signals every process of the step: the launcher goes on, what it started says that it was asked to stop."""
    (tmp_path / "stepdistill.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    pathlib.Path('status.json').write_text('{\"phase\": \"it was asked to stop\"}')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, end)\n"
        "print('training', flush=True)\n"
        "time.sleep(30)\n"
    )
    for name, lines in {
        "scontrol": '[ "$1" = show ] && echo node7 || echo "$@"',
        "srun": 'shift\nexec setsid "$@"',
        "accelerate": f"cd {tmp_path}\n{sys.executable} -m stepdistill train\nexit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node7",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "12",
    }
    script = HERE.parents[1] / "train" / "distributed" / "slurm.sh"
    with subprocess.Popen(
        [str(script), "recipe.yaml", "--output", str(tmp_path)],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout.readline() == "training\n"
        (step,) = psutil.Process(job.pid).children()
        os.killpg(step.pid, signal.SIGUSR1)
        said = job.communicate(timeout=20)[0].splitlines()
    assert said == ["requeue 12"] and job.returncode == 0
    # One that fails is not, though the folder still says that it was asked to stop, and Slurm ends the other nodes.
    (tmp_path / "accelerate").write_text("#!/usr/bin/env bash\nexit 3\n")
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\necho "$1"\nshift\nexec "$@"\n')
    done = subprocess.run(
        [str(script), "recipe.yaml", "--output", str(tmp_path)],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "--kill-on-bad-exit=1\n")
