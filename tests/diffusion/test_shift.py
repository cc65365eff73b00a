"""A flow teacher's time shift: read as its pipeline reads it, and one rule for every evenly spread time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_pipeline, tiny_prompts
from torch import Tensor

from stepdistill.data.pairs import PairCache
from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.shift import shift_of, shifted
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.losses.contract import PairOptions
from stepdistill.losses.fake_score import FakeScoreOptions, denoising_loss, views_of
from stepdistill.losses.first_step import first_step_loss
from stepdistill.losses.subinterval import subinterval_loss
from stepdistill.methods import find_method
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.pictures import teacher_pictures
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.testing.contract import batch_for
from stepdistill.testing.toys import Perceptron, ToyTeacher, loss_of, toy_batch, toy_student
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve

SHIFT = 3.0
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}


def scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def own_times(steps: int, **config: Any) -> Tensor:
    """The times [steps] of diffusers' scheduler on its even grid 1, 1 - 1/steps, ..."""
    own = scheduler(**config)
    own.set_timesteps(sigmas=list(uniform_times(steps)))
    return own.timesteps / 1000


@contextmanager
def times_seen() -> Iterator[list[Tensor]]:
    """Every time at which a network is called, in order, each [B]."""
    seen: list[Tensor] = []
    raw = Denoiser.raw

    def looking(self: Denoiser, x_t: Tensor, t: Tensor, *more: Any) -> Tensor:
        seen.append(t.detach().clone())
        return raw(self, x_t, t, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "raw", looking)
        yield seen


@pytest.mark.parametrize("s", [1.0, 0.5, 3.0, 7.3])
def test_the_shift_is_exact_at_both_ends_and_undone_by_its_inverse(s: float) -> None:
    u = torch.linspace(0, 1, 101)
    t = shifted(u, s)
    assert (float(t[0]), float(t[-1])) == (0, 1)
    assert (t - s * u / (1 + (s - 1) * u)).abs().max() < 1e-6
    assert (FlowPath(s).unshifted(FlowPath(s).shifted(u)) - u).abs().max() < 1e-6
    assert torch.equal(FlowPath().shifted(u), u)


@pytest.mark.parametrize(
    "config",
    [{}, {"shift": 3.0}, DYNAMIC, {**DYNAMIC, "time_shift_type": "linear", "max_shift": 3.0}],
    ids=["none", "static", "exponential", "linear"],
)
def test_the_shift_is_that_of_the_pipeline(config: dict[str, Any]) -> None:
    """The times at which SD3's own pipeline calls its network, given even sigmas."""
    pipe = tiny_pipeline("sd3")  # 8 x 8 latents in patches of 2: 16 tokens
    pipe.register_modules(scheduler=scheduler(**config))
    called: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda net, args, more: called.append(more["timestep"][:1] / 1000), with_kwargs=True
    )
    pipe("a", sigmas=list(uniform_times(5)), num_inference_steps=5, guidance_scale=0, output_type="latent")
    hook.remove()
    path = PipelineTeacher(pipe).path
    assert isinstance(path, FlowPath)
    assert torch.cat(called).tolist() == pytest.approx([path.shifted(u) for u in uniform_times(5)], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("UniPCMultistepScheduler", {"shift": 7.0}),
        ("DPMSolverMultistepScheduler", {"shift": 7.0}),
        ("DPMSolverMultistepScheduler", {"shift": 7.0, "shift_terminal": 0.1}),
        ("SASolverScheduler", {"shift": 7.0, "use_dynamic_shifting": True}),
    ],
)
def test_what_from_config_keeps_of_another_class_is_not_read(kind: str, kept: dict[str, Any]) -> None:
    """diffusers keeps the former scheduler's keys, its shift beside the flow_shift that the new one draws with."""
    import diffusers

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": SHIFT}
    made = getattr(diffusers, kind).from_config(scheduler(**kept).config, **flow)
    assert {**made.config, **kept} == made.config
    assert shift_of(made, 100) == SHIFT
    made.set_timesteps(4)
    drawn = [float(sigma) for sigma in made.sigmas[:4]]
    assert drawn == pytest.approx([shifted(u, SHIFT) for u in uniform_times(4)], abs=1e-3)

    back = scheduler().from_config(made.config, shift=5.0, shift_terminal=None, use_dynamic_shifting=False)
    assert back.config["flow_shift"] == SHIFT and shift_of(back, 100) == 5.0


def test_a_dynamic_shift_grows_with_the_image() -> None:
    dynamic = scheduler(use_dynamic_shifting=True)  # mu from 0.5 at 256 tokens to 1.15 at 4096
    assert shift_of(dynamic, 256) == pytest.approx(1.6487, abs=1e-4)
    assert shift_of(dynamic, 4096) == pytest.approx(3.1582, abs=1e-4)
    teacher = PipelineTeacher(tiny_pipeline("sd3"))
    assert teacher.family.tokens(teacher.denoiser.net, teacher.codec.shape) == 16


def test_a_spacing_that_is_no_shift_is_refused_and_may_be_given() -> None:
    pipe = tiny_pipeline("sd3")
    pipe.register_modules(scheduler=scheduler(use_karras_sigmas=True))
    with pytest.raises(UserError, match=r"use_karras_sigmas=True.*options\.shift") as caught:
        PipelineTeacher(pipe)
    assert "\n" not in str(caught.value)
    path = PipelineTeacher(pipe, shift=2.0).path
    assert isinstance(path, FlowPath) and path.shift == 2.0
    with pytest.raises(UserError, match=r"options\.shift is 3.*only flow models have"):
        PipelineTeacher(tiny_pipeline("sd"), shift=3.0)


def test_pairs_of_sd3_end_where_its_pipeline_draws(tmp_path: Any) -> None:
    """Four Euler steps of shift 3: the pipeline's own latents, and each of its states on the way."""
    teacher, prompts = PipelineTeacher(tiny_pipeline("sd3")), tiny_prompts("sd3", 3)
    options = PairOptions(pairs=3, pair_steps=4, pair_solver="euler", guidance=2.0)
    times = tuple(own_times(4, shift=SHIFT)[1:].tolist())
    assert times == pytest.approx([0.9, 0.75, 0.5])
    cache = PairCache(tmp_path, teacher, prompts, options, seed=5, times=times)
    cache.make(lambda rows: teacher.codec.encode([prompts[i] for i in rows]))
    index, states = torch.arange(3), []
    drawn = teacher.pipe(
        [prompts[i] for i in cache.prompt_index],
        negative_prompt=[""] * 3,
        sigmas=list(uniform_times(4)),
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=cache.noise(index),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, time, more: states.append(more["latents"]) or more,  # type: ignore[func-returns-value]
    ).images
    assert (cache.clean(index) - drawn).abs().max() < 1e-4
    kept = cache.states(index)
    assert kept is not None
    assert (kept - torch.stack(states[:3], 1)).abs().max() < 1e-4
    with pytest.raises(UserError, match=r"another shift \(3\.0, this run has 1\.0\)"):
        PairCache(tmp_path, PipelineTeacher(tiny_pipeline("sd3"), shift=1.0), prompts, options, seed=5)


def test_teacher_pictures_are_drawn_on_the_schedule() -> None:
    teacher = PipelineTeacher(tiny_pipeline("sd3"))
    with times_seen() as seen:
        teacher_pictures(teacher, ["a"], [0], 4, 1.0)
    assert torch.cat(seen).tolist() == pytest.approx(own_times(4, shift=SHIFT).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["lcm", "tcd", "tscd", "pcm"])
def test_grids_lie_on_the_teachers_schedule(name: str) -> None:
    """The teacher is called at times of the scheduler's grid alone, which are not evenly spread."""
    path, kind = FlowPath(SHIFT), find_method(name)
    grid, times = 40, tuple(path.shifted(time) for time in kind.default_times)
    method = kind(
        Copies(ToyTeacher(Perceptron(), path, "velocity"), toy_student(Perceptron(), path, "velocity")),
        times,
        kind.Options(grid=grid, guidance=1.0),
    )
    with times_seen() as seen:
        loss_of(method, "student", batch_for(method, 64))
    away = (seen[0][:, None] - own_times(grid, shift=SHIFT)).abs().amin(1)
    assert away.max() < 1e-6
    assert (seen[0][:, None] - torch.tensor(uniform_times(grid))).abs().amin(1).max() > 0.005
    assert len(seen[0].unique()) > 20


def test_a_grid_student_of_one_step_keeps_the_schedule_at_other_step_counts() -> None:
    path = FlowPath(SHIFT)
    assert on_stock_grid(Sampler((1.0,), False, grid=50), path, None, 4).times == pytest.approx(
        own_times(4, shift=SHIFT).tolist()
    )


def test_scores_the_follower_and_the_gan_are_read_at_shifted_times() -> None:
    """The same draws on a path with the shift: every time is the shift of what it is without."""
    found = {}
    for s in (1.0, SHIFT):
        path = FlowPath(s)
        teacher = ToyTeacher(Perceptron(), path, "velocity")
        fake, batch = Copies(teacher).add("fake"), toy_batch(512)
        x = batch.noise * 0.3
        with times_seen() as seen:
            views = views_of(fake, teacher, x, batch, FakeScoreOptions(), 1.0)
            denoising_loss(fake, x, batch, "output")
            method = find_method("pcm")(
                Copies(teacher, toy_student(Perceptron(), path, "velocity")),
                (1.0, 0.5),
                find_method("pcm").Options(adversarial_weight=1.0, guidance=1.0),
            )
            method.gan.for_generator(x, batch)  # type: ignore[union-attr,operator]
        found[s] = torch.stack([views.t, *seen[2:]])
    assert (found[SHIFT] - shifted(found[1.0], SHIFT)).abs().max() < 1e-6
    # Above 0.8: (0.98 - 4/7) / 0.96 of the scores', 3/7 of the others'.
    share = (found[SHIFT] > 0.8).float().mean(1).tolist()
    assert share == pytest.approx([0.426, 0.429, 0.429], abs=0.07)


def test_a_subinterval_keeps_its_part_of_the_schedule() -> None:
    """Times above s = 0.9 with shift 3, where u = 0.75: their u is uniform on (0.75, 1)."""
    path = FlowPath(SHIFT)
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    fake, batch = Copies(teacher).add("fake"), toy_batch(2000)
    with times_seen() as seen:
        subinterval_loss(fake, batch.noise, 0.9, batch, 10.0, "output")
        views_of(fake, teacher, batch.noise, batch, FakeScoreOptions(score_times=(0.0, 1.0)), 1.0, since=0.9)
    for t in seen:
        u = t / (SHIFT - (SHIFT - 1) * t)
        assert float(u.min()) == pytest.approx(0.75, abs=0.01)
        assert float(u.mean()) == pytest.approx(0.875, abs=0.01)


def test_the_first_steps_anchor_is_that_of_the_schedule() -> None:
    """DP-DMD's fifth of thirty steps: 0.9375 with shift 3, not 0.8333."""
    path = FlowPath(SHIFT)
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    student = toy_student(Perceptron(), path, "velocity")
    with times_seen() as seen:
        first_step_loss(student, teacher, toy_batch(2), 1.0, calls=5, grid=30)
    called = [float(t[0]) for t in seen[:5]]
    assert called == pytest.approx(own_times(30, shift=SHIFT)[:5].tolist(), abs=1e-6)
    assert path.shifted(1 - 5 / 30) == pytest.approx(0.9375)


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ([], [1.0, 0.9, 0.75, 0.5]),
        (["options.shift=1"], [1.0, 0.75, 0.5, 0.25]),
        (["student.times=[1.0, 0.5]"], [1.0, 0.5]),
    ],
    ids=["the teacher's", "another", "given times"],
)
def test_a_students_default_times_are_on_the_schedule(
    tmp_path: Any, sets: list[str], wanted: list[float]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\ndog\n")
    sets = [*sets, f"data.prompts={file}", "options.guidance=2"]
    recipe = load_recipe(None, teacher="tiny", method="pcm", sets=sets)
    job = assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("sd3"))
    assert job.sampler.times == pytest.approx(wanted, abs=1e-5)
    scheduler = stock_scheduler(job.sampler, job.student.path, job.teacher.pipe.scheduler)
    scheduler.set_timesteps(len(wanted))
    assert (scheduler.timesteps / 1000).tolist() == pytest.approx(wanted, abs=1e-5)
