"""The loop on a tiny teacher: resume, accumulation, processes, checkpoints, and what stops a run."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import COMMON, HERE, METHODS, recipe_of
from safetensors.torch import load_file, save_file
from small_images import pictures

from stepdistill.data.batches import Data
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import TrainingDiverged, UserError
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.system.processes import ALONE
from stepdistill.system.run_folder import RunStatus, read_status
from stepdistill.testing.toys import loss_of
from stepdistill.training import gradient_means
from stepdistill.training import preflight as checks
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import (
    OWN_HASH,
    checkpoints_in,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_state,
    save_checkpoint,
)
from stepdistill.training.exporting import export_student
from stepdistill.training.health import Seen, Vitals
from stepdistill.training.identity import resolve
from stepdistill.training.interruption import Preempted
from stepdistill.training.loop import train
from stepdistill.training.parallel import OneProcess
from stepdistill.training.run import Run
from stepdistill.training.run_report import Start
from stepdistill.training.schedule import learning_rate
from stepdistill.training.training_data import training_data
from stepdistill.training.weights import Weights


def start(recipe, folder, resume=False, preview=None, status=None):
    """One run in this process: the job and what training gave."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, None)
    data = training_data(job, folder)
    trained = train(
        job.objective, data, recipe, folder, accelerator, resume=resume, preview=preview, status=status
    )
    return job, trained


def final_tensors(folder):
    files = sorted(checkpoints_in(folder / "work" / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def curve(folder):
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "memory_bytes")} for row in rows
    ]


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_ten_steps_equal_five_and_a_kill_and_a_resume_bit_for_bit(method, tmp_path):
    """Weights, optimisers, averages, targets and the logged curve. The kill falls after step 7, so two steps past the
    last checkpoint are lost and done again."""
    _, unbroken = start(recipe_of(method, 10), tmp_path / "whole")

    def kill(step, ema):
        if step == 7:
            raise Killed
        return Seen({}, [])

    recipe = recipe_of(method, 10, "train.preview_every=1")
    with pytest.raises(Killed):
        start(recipe, tmp_path / "parts", preview=kill)
    assert [path.name for path in checkpoints_in(tmp_path / "parts" / "work" / "checkpoints")][
        -1
    ] == "step-00000005"
    _, trained = start(recipe, tmp_path / "parts", resume=True)
    assert trained.step == 10
    assert trained.passes.by_network == unbroken.passes.by_network and trained.passes.total > 0
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


@pytest.mark.slow
def test_an_optimiser_that_starts_anew_resumes_bit_for_bit(tmp_path):
    """Phased DMD's second phase begins after step 3, where its fake network is the teacher again: its optimiser has
    then seen that phase's two updates alone, and a checkpoint of that very step, without moments, goes on exactly."""
    sets = [
        *COMMON, "train.checkpoint_every=4", "student.times=[1.0, 0.5]", "train.updates=8",
        "options.phase_updates=2", "options.fake_updates=1",
    ]  # fmt: skip
    recipe = load_recipe(HERE / "empty.yaml", method="phased_dmd", sets=sets)
    start(recipe, tmp_path / "whole")

    def kill(step, ema):
        if step == 5:
            raise Killed
        return Seen({}, [])

    recipe = load_recipe(HERE / "empty.yaml", method="phased_dmd", sets=[*sets, "train.preview_every=1"])
    with pytest.raises(Killed):
        start(recipe, tmp_path / "parts", preview=kill)
    folder = checkpoints_in(tmp_path / "parts" / "work" / "checkpoints")[-1]
    assert folder.name == "step-00000004" and not load_file(folder / "optimizer-fake.safetensors")
    start(recipe, tmp_path / "parts", resume=True)
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert [float(whole[f"optimizer-{name}.0.step"]) for name in ("fake", "expert-1", "student")] == [2.0] * 3


def assert_same_run(one, two):
    """Losses and gradient norms of every step agree to rounding, and the weights moved to the same place. (Adam turns
    the rounding of a gradient near zero into a step of either sign, so single weights may differ by a step.)"""
    for a, b in zip(curve(one), curve(two), strict=True):
        assert a["network"] == b["network"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), a["update"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2), a["update"]
    first, second = final_tensors(one), final_tensors(two)
    assert first.keys() == second.keys()
    weights = [name for name in first if name.startswith("roles.student.")]
    apart = math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in weights))
    size = math.sqrt(sum(float(first[n].square().sum()) for n in weights))
    assert apart < 1e-4 * size


@pytest.mark.parametrize("method", list(METHODS))
def test_a_batch_in_two_halves_equals_one(method, tmp_path):
    start(recipe_of(method, 4), tmp_path / "one")
    start(recipe_of(method, 4, "train.accumulate=2"), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_grouped_batch_in_two_halves_equals_one(tmp_path):
    start(recipe_of("lcm", 4, "train.group=2"), tmp_path / "one")
    start(recipe_of("lcm", 4, "train.group=2", "train.accumulate=2"), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_loop
from run_toy import METHODS, recipe_of
from accelerate import Accelerator
from stepdistill.training.identity import resolve
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.training_data import training_data
from stepdistill.training.loop import train
from stepdistill.training.parallel import parallel_of
from stepdistill.system.processes import launched
accelerator = Accelerator(cpu=True)
parallel = parallel_of("auto", launched(), accelerator.device)
assert accelerator.num_processes == 2
test_loop.switched(parallel, Path(sys.argv[3]))
for method in METHODS:
    folder = Path(sys.argv[3]) / method
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    recipe = recipe_of(method, 4, "train.log_every=3")
    job = assemble(resolve(recipe), accelerator, None)
    train(job.objective, training_data(job, folder), recipe, folder, accelerator, parallel=parallel)
accelerator.end_training()
"""


HELD = ("float32", "master", "bf16")


def switched(parallel, folder):
    """Trains two layers, of which each sample is for one, held in every way, and writes weights and moments."""
    folder.mkdir(parents=True, exist_ok=True)
    for weights in HELD:
        generator = torch.Generator().manual_seed(0)
        layers = [torch.nn.Linear(4, 4) for _ in range(2)]
        parameters = [p for layer in layers for p in layer.parameters()]
        for p in parameters:
            p.data = torch.randn(p.shape, generator=generator)
        options = TrainOptions(weights=weights, precision="float32" if weights == "float32" else "bf16")
        held = Weights("student", options, parameters, [] if weights == "float32" else parameters)
        # One process has samples for both layers, then nobody for the second one, then each for another one.
        for step, whose in enumerate(([0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0])):
            # Of whole numbers that bfloat16 sums exactly.
            x, field = torch.randint(-2, 3, (2, 4, 4), generator=generator).to(parameters[0].dtype)
            own = range(4)[parallel.rank * 4 // parallel.count :][: 4 // parallel.count]
            parallel.expect(parameters)
            sum((layers[whose[i]](x[i]) * field[i]).sum() for i in own).div(len(own)).backward()
            parallel.average(parameters)
            held.step(step)
        state = optimizer_state(held.optimizer) | {
            f"weight {i}": p.detach() for i, p in enumerate(parameters)
        }
        save_file(state, folder / f"switched-{weights}-{parallel.rank}.safetensors")


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    """The same curve and weights, for every method, of two nodes with one process each: two launches. And of networks
    that are switched by time the same bits of weights and moments, where a process or all of them have no sample for
    one; stochastic rounding draws the same in both."""
    script, config = tmp_path / "two.py", HERE.parents[1] / "train" / "distributed" / "two_nodes.yaml"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--main_process_port", "29517", "--machine_rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    nodes = [
        subprocess.Popen(
            [*command, rank, str(script), str(HERE), str(Path(__file__).parent), str(tmp_path / "two")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in "01"
    ]  # fmt: skip
    for method in METHODS:
        start(recipe_of(method, 4), tmp_path / "one" / method)
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:]
    for method in METHODS:
        assert_same_run(tmp_path / "one" / method, tmp_path / "two" / method)
        one, two = (
            checkpoints_in(tmp_path / name / method / "work" / "checkpoints")[-1] for name in ("one", "two")
        )
        assert read_state(one)["passes"] == read_state(two)["passes"]
    switched(OneProcess(ALONE, torch.device("cpu")), tmp_path / "one")
    for weights in HELD:
        wanted = load_file(tmp_path / "one" / f"switched-{weights}-0.safetensors")
        assert [float(wanted[f"{i}.step"]) for i in range(4)] == [3, 3, 2, 2]
        for rank in range(2):
            found = load_file(tmp_path / "two" / f"switched-{weights}-{rank}.safetensors")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(value, found[name]) for name, value in wanted.items()), (weights, rank)


@pytest.fixture
def gloo():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_in_buckets_as_they_lie_in_memory(monkeypatch, gloo):
    """Half of the one process's own, where a sum over it is divided by two: in three buckets, one of them of another
    type, with a gradient that is missing and one that lies as a channels-last weight does."""
    shapes, kinds = [(2, 3, 2, 2), (5,), (4, 2), (3,)], [torch.float32] * 3 + [torch.bfloat16]
    own = [torch.nn.Parameter(torch.zeros(s, dtype=k)) for s, k in zip(shapes, kinds, strict=True)]
    own[0].data = own[0].data.contiguous(memory_format=torch.channels_last)
    wanted = [torch.arange(float(p.numel())).view(p.shape).to(p.dtype) for p in own]
    for parameter, value in zip(own, wanted, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(value)
    own[1].grad = None
    monkeypatch.setattr(gradient_means, "BUCKET_BYTES", 4 * 13)
    means = gradient_means.GradientMeans(own, 2)
    assert [len(bucket) for bucket in means.buckets] == [1, 2, 1]
    means.finish()
    assert own[1].grad is None
    assert all(torch.equal(own[i].grad, wanted[i] / 2) for i in (0, 2, 3))
    assert own[0].grad.stride() == own[0].stride() != wanted[0].stride()


def test_gradients_are_on_their_way_while_the_backward_pass_goes_on(monkeypatch, gloo):
    """When the first layer's backward begins, the sums of all later layers were started, those of an unused one apart:
    that is sent in its place, so what comes after it waits to the end. Parts that do not complete the gradients send
    nothing."""
    layers = [torch.nn.Linear(4, 4) for _ in range(5)]
    unused, parameters = layers[2], [p for layer in layers for p in layer.parameters()]
    monkeypatch.setattr(gradient_means, "BUCKET_BYTES", 80)  # a layer's
    means, sent, seen = gradient_means.GradientMeans(parameters, 1), list[int](), list[list[int]]()
    reduce = torch.distributed.all_reduce

    def counted(flat, **options):
        sent.append(flat.numel())
        return reduce(flat, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted)

    def backward():
        x = torch.ones(2, 4)
        for i, layer in enumerate(layers):
            if layer is not unused:
                x = layer(x)
            if not i:
                x.register_hook(lambda gradient: seen.append(list(sent)))
        x.square().sum().backward()

    backward()
    before = [p.grad.clone() for layer in layers if layer is not unused for p in layer.parameters()]
    assert seen == [[]] and sent == []
    means.expect()
    backward()
    assert seen[1] == [22, 22] == sent  # each with who has what of its two parameters
    means.finish()
    assert sent == [22] * 5 and all(p.grad is None for p in unused.parameters())
    used = [p for layer in layers if layer is not unused for p in layer.parameters()]
    assert all(torch.allclose(p.grad, 2 * value) for p, value in zip(used, before, strict=True))


@pytest.mark.parametrize("method", list(METHODS))
def test_the_teacher_is_untouched_and_the_same_seed_gives_the_same_loss(method, tmp_path):
    """Whenever the steps' numbers are read."""
    first, _ = start(recipe_of(method, 4), tmp_path / "a")
    before = first.teacher.fingerprint()
    second, _ = start(recipe_of(method, 4, "train.log_every=3"), tmp_path / "b")
    assert second.teacher.fingerprint() == before
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert all(p.grad is None for p in first.teacher.denoiser.net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
def test_a_signal_ends_the_step_and_the_resumed_run_is_the_unbroken_one(number, tmp_path):
    """Ctrl-C and schedulers' signals in the middle of step 7 leave a checkpoint of 7 whole steps (one more than the
    last due one), and their numbers; a scheduler that is in a hurry and sends both does not break it."""
    recipe = recipe_of("lcm", 8, "train.log_every=10")
    start(recipe, tmp_path / "whole")
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, None)
    plain = job.method.after_step

    def interrupted(turn):
        if turn.step == 6:
            signal.raise_signal(number)
            if number == signal.SIGUSR1:
                signal.raise_signal(signal.SIGTERM)
        plain(turn)

    job.method.after_step = interrupted
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt) as ended:
        train(job.objective, training_data(job, tmp_path / "parts"), recipe, tmp_path / "parts", accelerator)
    assert isinstance(ended.value, Preempted) == (number != signal.SIGINT)
    assert checkpoints_in(tmp_path / "parts" / "work" / "checkpoints")[-1].name == "step-00000007"
    assert len(curve(tmp_path / "parts")) == 7
    start(recipe, tmp_path / "parts", resume=True)
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_resumed_run_says_at_once_how_far_it_is(tmp_path):
    """Also where no update is left, as after a kill while the student was exported."""
    start(recipe_of("reflow", 2), tmp_path)
    status = RunStatus(tmp_path, 2)
    start(recipe_of("reflow", 2), tmp_path, resume=True, status=status)
    assert status.now.update == read_status(tmp_path).update == 2


def test_bf16_starts_where_float32_starts(tmp_path):
    """The first loss in bf16 is that of float32 within bf16's rounding, and weights stay float32."""
    start(recipe_of("reflow", 2), tmp_path / "full")
    job, _ = start(recipe_of("reflow", 2, "train.precision=bf16"), tmp_path / "half")
    full, half = curve(tmp_path / "full")[0]["loss"], curve(tmp_path / "half")[0]["loss"]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full
    assert {p.dtype for p in job.student.net.parameters()} == {torch.float32}
    held = {name: p.dtype for name, p in job.teacher.denoiser.net.named_parameters()}
    assert held["conv_in.weight"] == torch.bfloat16 and held["conv_norm_out.weight"] == torch.float32


def job_of(method, *more):
    return assemble(resolve(recipe_of(method, 4, *more)), Accelerator(cpu=True), None)


def points(job, count=2):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, *job.teacher.codec.shape, generator=generator)
    return x_t, torch.tensor([0.97, 0.3])[:count], job.teacher.codec.encode(job.prompts[:count])


def test_bf16_rounds_nothing_that_is_trained_or_exported(tmp_path):
    """Student, follower and encoders are the float32 weights of the teacher's files, in the exported folder too; and
    teacher and follower still compute the same number for number, so that matching starts at a field of zero."""
    job = job_of("dmd", "train.precision=bf16")
    files = Path(job.source)
    original = load_file(files / "unet" / "diffusion_pytorch_model.safetensors")
    for net in (job.student.net, job.method.fake.net):
        assert all(torch.equal(value, original[name]) for name, value in net.state_dict().items())
    where = points(job)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        teacher, fake = (who.predict(*where).x0 for who in (job.teacher, job.method.fake))
    assert torch.equal(teacher, fake)
    assert torch.equal(job.teacher.predict(*where).x0, fake)  # outside of a step as within
    export_student(job, tmp_path / "student", [Start(command="none")])
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        saved, loaded = load_file(tmp_path / "student" / name), load_file(files / name)
        assert all(torch.equal(saved[key].float(), loaded[key].float()) for key in loaded), name


def test_the_teacher_of_a_bf16_run_may_compute_in_float32():
    full, mixed = job_of("lcm"), job_of("lcm", "train.precision=bf16", "train.teacher_precision=float32")
    where = points(full)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed.teacher.predict(*where).x0, full.teacher.predict(*where).x0)
        low = mixed.student.predict(*where).x0
    assert not torch.equal(low, full.student.predict(*where).x0)


def test_a_pipeline_object_is_left_in_its_own_precision():
    """A float16 object teaches with a float32 VAE and in the run's precision, and can still be drawn from."""
    from diffusers import DiffusionPipeline

    from stepdistill.system.emoji import teacher_folder

    pipe = DiffusionPipeline.from_pretrained(teacher_folder("emoji"), dtype=torch.float16)
    job = assemble(resolve(recipe_of("lcm", 4)), Accelerator(cpu=True), pipe)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {part.dtype for part in parts.values()} == {torch.float16}
    assert job.teacher.pipe.vae.dtype == job.teacher.denoiser.net.dtype == torch.float32
    values = job.student.net.state_dict()
    assert all(torch.equal(value.float(), values[name]) for name, value in pipe.unet.state_dict().items())
    image = job.teacher.codec.to_frames(1e5 * torch.randn(1, *job.teacher.codec.shape))[:, 0]
    assert bool(torch.isfinite(image).all())


@pytest.mark.parametrize("method", ["dmd", "lcm"])
def test_every_trained_weight_has_a_gradient_in_bf16(method, tmp_path):
    """Also where the network was called without a graph before, in the same step: DMD's first of two calls, and the
    student as its own target. No cast of a weight outlives a call without a graph."""
    more = {"dmd": ["options.warm_start=0"], "lcm": ["options.target_decay=0"]}[method]
    recipe = recipe_of(method, 4, "train.precision=bf16", *more)
    job = assemble(resolve(recipe), Accelerator(cpu=True), None)
    data, graphs = training_data(job, tmp_path), []

    def look(net, *_):
        graphs.append(torch.is_grad_enabled())
        assert torch.is_autocast_cache_enabled() == graphs[-1]

    job.student.net.register_forward_pre_hook(look)
    for step in range(1, 20):
        if job.method.turn(step).network != "student":
            continue
        graphs.clear()
        job.student.net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_of(job.method, "student", data.batch(step, 0, 4, 4))
        loss.backward()
        missing = [name for name, p in job.student.net.named_parameters() if p.grad is None]
        assert not missing
        if False in graphs and True in graphs[graphs.index(False) :]:
            break
    else:
        pytest.fail("no step called the student without a graph and then with one")


def test_lora_trains_and_keeps_the_adapter_alone(tmp_path):
    """The frozen base is the teacher's, in the target network too; what is kept restores every tensor."""
    recipe = recipe_of("lcm", 5, "student.lora_rank=4")
    job, _ = start(recipe, tmp_path)
    kept = load_file(checkpoints_in(tmp_path / "work" / "checkpoints")[-1] / "roles.safetensors")
    assert {name.split(".")[0] for name in kept} == {"student", "target"}
    assert all(".lora_" in name for name in kept)
    roles = job.method.roles
    assert any(bool(p.any()) for name, p in roles.weights("student").items() if ".lora_B." in name)
    again = assemble(resolve(recipe), Accelerator(cpu=True), None)
    Run(again.objective, recipe, tmp_path).restore()
    wanted, found = roles.state(), again.method.roles.state()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("sheets", "reads"), [(1, 1), (7, 100)])
def test_a_nan_stops_the_run_and_names_network_step_and_checkpoint(sheets, reads, tmp_path):
    """Where steps are read late it is the first bad one that is named, and no checkpoint is made of it: the next read
    after step 7 is the one before the checkpoint of 10 steps."""
    recipe = recipe_of("dmd", 20, f"train.preview_every={sheets}", f"train.log_every={reads}")
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, None)

    def poison(step, ema):
        if step == 7:
            with torch.no_grad():
                job.student.net.conv_out.bias[0] = math.nan
        return Seen({}, [])

    with pytest.raises(
        TrainingDiverged, match=r"the loss of (fake score|student) is nan at update 7; .*step-00000005"
    ):
        train(job.objective, training_data(job, tmp_path), recipe, tmp_path, accelerator, preview=poison)
    assert checkpoints_in(tmp_path / "work" / "checkpoints")[-1].name == "step-00000005"
    assert [row["update"] for row in curve(tmp_path)] == list(range(7))


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        start(recipe_of("lcm", 5), tmp_path, resume=True)


def test_resume_refuses_another_recipe_and_names_the_key(tmp_path):
    start(recipe_of("lcm", 5), tmp_path)
    with pytest.raises(UserError, match=r"the recipe differs .* in options.guidance, data.pairs, train.lr"):
        start(
            recipe_of("lcm", 5, "train.lr=3e-4", "options.guidance=3", f"data.pairs={tmp_path}/new"),
            tmp_path,
            True,
        )


def altered(folder, key):
    """The last checkpoint with another hash of one input, or without the name of its random numbers."""
    state = checkpoints_in(folder / "work" / "checkpoints")[-1] / "state.json"
    content = json.loads(state.read_text())
    content.pop(OWN_HASH, None)
    if key is None:
        assert content.pop("draws") == "philox4x32-10"
    else:
        content["inputs"][key] = "0" * 64
    state.write_text(json.dumps(content))


def test_resume_refuses_other_inputs_under_the_same_names_and_other_random_numbers(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text((HERE / "prompts.txt").read_text())
    recipe = recipe_of("lcm", 5, f"data.prompts={prompts}")
    job, _ = start(recipe, tmp_path / "run")
    kept = json.loads(
        (checkpoints_in(tmp_path / "run" / "work" / "checkpoints")[-1] / "state.json").read_text()
    )["inputs"]
    assert checks._begun_in(tmp_path / "run") == str(Path.cwd())
    assert kept["teacher"] == job.teacher.fingerprint() and set(kept) == {"teacher", "data.prompts"}
    data = training_data(job, tmp_path / "run")
    run = Run(job.objective, recipe, tmp_path / "run", data.identity())
    run.restore()
    assert run.step == 5
    prompts.write_text(prompts.read_text() + "one more\n")
    changed = Data(job.teacher, read_prompts(prompts), 0)
    with pytest.raises(UserError, match=r"--resume: data.prompts \(.*p.txt\) changed since step 5"):
        Run(job.objective, recipe, tmp_path / "run", changed.identity()).restore()
    altered(tmp_path / "run", "teacher")
    with pytest.raises(UserError, match=r"--resume: teacher \(.*sd\) changed since step 5"):
        Run(job.objective, recipe, tmp_path / "run", data.identity()).restore()
    altered(tmp_path / "run", None)  # as earlier versions wrote it
    with pytest.raises(
        UserError, match=r"--resume: .*step-00000005 .*other random numbers \(of an older version\)"
    ):
        Run(job.objective, recipe, tmp_path / "run", data.identity()).restore()
    Run(job.objective, recipe, tmp_path / "run").restore()  # a student can still be exported from it


def test_resume_takes_what_cannot_move_a_weight(tmp_path):
    """What is evaluated, kept and drawn may change between two parts of a run."""
    start(recipe_of("lcm", 5), tmp_path)
    _, trained = start(
        recipe_of("lcm", 5, "evaluate=emoji", "train.keep=5", "train.preview_every=2"), tmp_path, True
    )
    assert trained.step == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_resume_refuses_a_damaged_checkpoint(damage, tmp_path):
    start(recipe_of("lcm", 5), tmp_path)
    file = checkpoints_in(tmp_path / "work" / "checkpoints")[-1] / "roles.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"step-00000005.*roles.safetensors"):
        start(recipe_of("lcm", 5), tmp_path, resume=True)


def test_resume_refuses_a_checkpoint_without_a_part_of_the_run(tmp_path):
    """Also one whose state.json does not miss it: an optimiser would start anew without a word."""
    start(recipe_of("dmd", 2, "train.checkpoint_every=2"), tmp_path / "run")
    last = checkpoints_in(tmp_path / "run" / "work" / "checkpoints")[-1]
    state = json.loads((last / "state.json").read_text())
    del state[OWN_HASH], state["files"]["optimizer-fake.safetensors"]
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"another version of the run \(optimizer-fake differs\)"):
        start(recipe_of("dmd", 2, "train.checkpoint_every=2"), tmp_path / "run", resume=True)


def test_a_state_that_was_altered_is_refused(tmp_path):
    """A single digit of it, too: no other file has a hash of this one."""
    save_checkpoint(tmp_path, 3, {"roles": {"w": torch.zeros(2)}}, {"seconds": 12.5, "starts": ()}, keep=1)
    state = tmp_path / "step-00000003" / "state.json"
    assert read_state(state.parent)["seconds"] == 12.5
    state.write_text(state.read_text().replace("12.5", "12.4"))
    with pytest.raises(
        UserError, match=r"no readable state.json \(it is not what was written\): delete that folder"
    ):
        read_state(state.parent)


def test_moments_of_weights_with_channels_last_come_back_to_their_weights():
    """Files have channels first, and a fused update pairs numbers by where they lie."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net, x = torch.nn.Conv2d(4, 6, 3), torch.ones(1, 4, 8, 8).cumsum(3)
        with torch.no_grad():
            for value in net.parameters():
                value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
        net.to(memory_format=layout)
        kept = {}
        for _ in range(2):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
            load_optimizer_state(optimizer, kept)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            kept = {name: value.contiguous() for name, value in optimizer_state(optimizer).items()}
        ends.append(net.weight.detach())
    torch.testing.assert_close(*ends)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    tensors = {"method": {"w": torch.arange(4.0)}}
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tensors, {"seconds": 1.0}, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020", "step-00000030"]
    loaded, state = load_checkpoint(tmp_path / "step-00000030")
    assert state["step"] == 30
    assert torch.equal(loaded["method"]["w"], torch.arange(4.0))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on file size stands for the full disk: the second checkpoint fails with one line, the first is intact."""
    save_checkpoint(tmp_path, 10, {"method": {"w": torch.ones(10)}}, {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"checkpoint.*the last good one is"):
            save_checkpoint(tmp_path, 20, {"method": {"w": torch.ones(1_000_000)}}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    loaded, _ = load_checkpoint(tmp_path / "step-00000010")
    assert torch.equal(loaded["method"]["w"], torch.ones(10))


def test_a_run_restores_where_it_was(tmp_path):
    recipe = recipe_of("dmd", 10)
    _, trained = start(recipe, tmp_path)
    job = assemble(resolve(recipe), Accelerator(cpu=True), None)
    state = Run(job.objective, recipe, tmp_path)
    state.restore()
    assert state.step == 10
    assert state.seconds == pytest.approx(trained.seconds, abs=5)


def test_a_run_goes_back_to_the_checkpoint_that_is_asked_for(tmp_path):
    """Every part of it, though a later one was loaded before; the time that was spent stays spent."""
    recipe = recipe_of("dmd", 10)
    start(recipe, tmp_path)
    job = assemble(resolve(recipe), Accelerator(cpu=True), None)
    run = Run(job.objective, recipe, tmp_path)
    run.restore()
    spent, (first, last) = run.seconds, checkpoints_in(tmp_path / "work" / "checkpoints")
    assert run.last_good == last and set(run.parts) == {
        "roles",
        "optimizer-student",
        "optimizer-fake",
        "ema",
    }
    run.restore(first)
    assert (run.step, run.seconds, run.last_good) == (5, spent, first)
    kept, _ = load_checkpoint(first)
    for name, part in run.parts.items():
        now = part.state()
        assert now.keys() == kept[name].keys()
        assert all(torch.equal(value, kept[name][key]) for key, value in now.items())


@pytest.mark.parametrize(
    ("more", "rates"),
    [
        (["train.lr=1e-2", "train.weight_decay=0", "train.clip=0", "train.betas=[0.8, 0.95]"], [1e-2, 1e-2]),
        (
            ["train.weight_decay=0.5", "train.clip=0.01", "train.average=0", "train.average_power=1"],
            [1e-4, 1e-4],
        ),
        (["train.warmup=4", "train.average=0.15", "train.betas=[0.0, 0.9]"], [2.5e-5, 5e-5]),
        (["train.schedule=linear", "train.seed=1"], [1e-4, 5e-5]),
        # An eps network called at the end of Stable Diffusion's table, where alphas_cumprod is 0.00466.
        (["train.lr_of=x0", "train.clip=0"], [1e-4 * (0.00466 / 0.99534) ** 0.5] * 2),
    ],
)
def test_two_updates_are_adams_with_the_options_of_train(more, rates, tmp_path):
    """Rates, moments of the clipped gradient, decayed weights and their average, from the checkpoints alone."""
    recipe = recipe_of("reflow", 2, "train.checkpoint_every=1", "options.reflow_updates=0", *more)
    options = recipe.train
    before = job_of("reflow").student.net
    names = [name for name, _ in before.named_parameters()]
    weights = [{name: value.detach().clone() for name, value in before.named_parameters()}]
    start(recipe, tmp_path)
    rows = curve(tmp_path)
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-3)
    (b1, b2), clip = options.betas, options.clip or math.inf
    first, second = checkpoints_in(tmp_path / "work" / "checkpoints")
    for folder in (first, second):
        state = load_file(folder / "roles.safetensors")
        weights.append({name: state[f"student.{name}"] for name in names})
    moments = load_file(first / "optimizer-student.safetensors")
    norm = min(rows[0]["grad_norm"], clip)
    m, v = (torch.cat([moments[f"{i}.{key}"].flatten() for i in range(len(names))]).double()
            for key in ("exp_avg", "exp_avg_sq"))  # fmt: skip
    assert float(m.norm()) == pytest.approx((1 - b1) * norm, rel=1e-3)
    assert float(v.sum()) == pytest.approx((1 - b2) * norm**2, rel=1e-3)
    start_, end = (torch.cat([each[name].flatten() for name in names]).double() for each in weights[:2])
    step = (m / (1 - b1)) / ((v / (1 - b2)).sqrt() + 1e-8)
    wanted = start_ * (1 - rates[0] * options.weight_decay) - rates[0] * step
    assert float((end - wanted).abs().max()) < 1e-2 * rates[0] + 1e-6
    shadow = load_file(second / "ema.safetensors")
    decays = [min(options.average, (1 + n) / (10 + n)) for n in range(2)]
    if options.average_power:
        decays = [(1 - 1 / (n + 1)) ** (options.average_power + 1) for n in range(2)]
    for name in names:
        average = weights[0][name]
        for decay, now in zip(decays, weights[1:], strict=True):
            average = decay * average + (1 - decay) * now[name]
        torch.testing.assert_close(shadow[name], average, rtol=1e-5, atol=1e-7)


def test_a_warm_start_has_betas_of_its_own(tmp_path):
    """The student's first update regresses; its second, the run's third, is against the heads, without momentum."""
    own = ["options.warm_start=1", "options.warm_start_betas=[0.5, 0.9]", "train.betas=[0.0, 0.99]"]
    own += [
        "options.pairs=8",
        "options.pair_steps=2",
        "train.updates=3",
        "train.checkpoint_every=1",
        "train.clip=0",
    ]
    own.append(f"data.images={pictures(tmp_path / 'images', 8, 32)}")
    start(load_recipe(HERE / "empty.yaml", method="gdd", sets=[*COMMON, *own]), tmp_path)
    rows, folders = curve(tmp_path), checkpoints_in(tmp_path / "work" / "checkpoints")
    assert [row["network"] for row in rows] == ["student", "discriminator", "student"]
    found = []
    for folder in (folders[0], folders[-1]):
        moments = load_file(folder / "optimizer-student.safetensors")
        keys = sorted(name.rpartition(".")[0] for name in moments if name.endswith("exp_avg"))
        found.append(
            [
                torch.cat([moments[f"{i}.{kind}"].flatten() for i in keys]).double()
                for kind in ("exp_avg", "exp_avg_sq")
            ]
        )
    (m, v), (m_then, v_then) = found
    assert float(m.norm()) == pytest.approx(0.5 * rows[0]["grad_norm"], rel=1e-3)
    assert float(v.sum()) == pytest.approx(0.1 * rows[0]["grad_norm"] ** 2, rel=1e-3)
    assert float(m_then.norm()) == pytest.approx(rows[2]["grad_norm"], rel=1e-3)
    torch.testing.assert_close(v_then, 0.99 * v + 0.01 * m_then**2, rtol=1e-4, atol=1e-12)


def test_a_budget_ends_a_run_and_another_seed_is_another_run(tmp_path):
    _, trained = start(recipe_of("reflow", 3, "train.budget_seconds=1e-6"), tmp_path / "a")
    assert trained.step == 1
    start(recipe_of("reflow", 1, "train.seed=1"), tmp_path / "b")
    assert curve(tmp_path / "a")[0]["loss"] != curve(tmp_path / "b")[0]["loss"]


def test_an_adapter_has_the_rank_and_the_scale_it_was_given():
    from stepdistill.networks.lora import lora_layers

    job = job_of("lcm", "options.target_decay=0", "student.lora_rank=4", "student.lora_alpha=6")
    for layer in lora_layers(job.student.net).values():
        assert layer.scaling == {"student": 6 / 4}
        assert layer.lora_A["student"].weight.shape[0] == 4


def test_learning_rates():
    options = TrainOptions(updates=110, lr=1.0, warmup=10, schedule="cosine")
    assert learning_rate(options, 0) == pytest.approx(0.1)
    assert learning_rate(options, 9) == pytest.approx(1.0)
    assert learning_rate(options, 60) == pytest.approx(0.5)
    assert learning_rate(TrainOptions(updates=100, lr=2.0, schedule="linear"), 75) == pytest.approx(0.5)
    assert learning_rate(TrainOptions(updates=100, lr=2.0), 99) == 2.0


def test_vitals_see_collapse_and_saturation():
    generator = torch.Generator().manual_seed(0)
    varied = torch.rand(8, 3, 16, 16, generator=generator)
    same = varied[:1].expand(8, -1, -1, -1) + 0.01 * torch.rand(8, 3, 16, 16, generator=generator)
    reference = Vitals.of(varied)
    assert reference.diversity == pytest.approx(1 / 3, abs=0.01)  # E|U - U'| of two uniform numbers
    assert [worry.split(":")[0] for worry in Vitals.of(same.clamp(0, 1)).worries(reference)] == ["collapse"]
    assert [w.split(":")[0] for w in Vitals.of((varied > 0.5).float()).worries(reference)] == [
        "oversaturation"
    ]
    assert reference.worries(reference) == []


def test_where_memory_ends_one_line_says_what_holds_it_and_the_checkpoint_stays(tmp_path):
    def full(step, ema):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Seen({}, [])

    recipe = recipe_of("lcm", 3, "train.preview_every=1", "train.checkpoint_every=1")
    with pytest.raises(
        UserError, match=r"train\.batch=4 train\.accumulate=1 .*`stepdistill plan .*recipe.yaml` says"
    ):
        start(recipe, tmp_path, preview=full)
    assert checkpoints_in(tmp_path / "work" / "checkpoints")[-1].name == "step-00000001"
