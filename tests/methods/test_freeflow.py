"""FreeFlow against closed forms on Gaussians, and data-free methods in the loop with nothing to load."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from flow_toy import MU, C, Velocity, errors, from_the_teacher
from run_toy import HERE
from tiny import tiny_pipeline

from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.data.training_images import EmbeddedImages, ImageFolder
from stepdistill.diffusion.change_of_path import STRAIGHT, on_straight
from stepdistill.diffusion.path import FlowPath, TablePath, TrigPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.flow_maps import FlowMapMethod, logit_normal
from stepdistill.losses.running_means import Balance
from stepdistill.methods.flow_map import FlowMap
from stepdistill.methods.freeflow import FreeFlow
from stepdistill.networks.roles import Copies
from stepdistill.recipes.recipe import load_recipe
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

PATH = FlowPath()


def freeflow(net: torch.nn.Module, times: tuple[float, ...] = (1.0,), **options: Any) -> FreeFlow:
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH)
    chosen = FreeFlow.Options.model_validate({"guidance": 1.0, **options})
    return FreeFlow(Copies(teacher, toy_student(net, PATH, "velocity")), times, chosen)


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.6)])
def test_prediction_vanishes_at_the_exact_map_and_not_beside_it(times: tuple[float, ...]) -> None:
    """dX/ds = v(X, s) along the whole path, from noise and from the student's own states."""
    method = freeflow(GaussianFlowMap(MU, C), times)
    for step in range(4):  # both starts are drawn within these
        batch = toy_batch(64, step)
        x, t = method.starts(batch)
        s = t * batch.draws.uniform("s", 0.02, 1.0)
        assert float(method.prediction(x, t, s, Condition())[1].abs().max()) < 1e-4
        with torch.no_grad():
            method.student.net.mean += 0.1
        mean, error = method.prediction(x, t, s, Condition())
        assert mean.requires_grad and not error.requires_grad and not x.requires_grad
        # At the shifted map's states the teacher differs by the shift alone: -0.1 (1 - k_s (1 - s)) per element.
        variance = (1 - s).square() * C**2 + s.square()
        slope = (s - (1 - s) * C**2) / variance
        torch.testing.assert_close(
            error, per_sample(-0.1 * (1 + slope * (1 - s)), mean).expand_as(error), atol=1e-4, rtol=1e-3
        )
        with torch.no_grad():
            method.student.net.mean -= 0.1


def test_a_teachers_copy_starts_without_error_at_the_end_of_no_jump() -> None:
    """At s = t = 1 the student's own velocity is u(z, 1, 1), which the second time leaves the teacher's."""
    net = Perceptron()
    method = FreeFlow(
        Copies(ToyTeacher(net, PATH, "velocity"), toy_student(Perceptron(), PATH, "velocity")), (1.0,),
        FreeFlow.Options(guidance=1.0),
    )  # fmt: skip
    one = torch.ones(8)
    assert not bool(method.prediction(toy_batch(8).noise, one, one, Condition())[1].any())


def test_the_corrections_field_of_a_mean_shift() -> None:
    """Samples of N(m, c^2) under a teacher of N(0, c^2): v_fake - v_T = -m r / S_r^2 everywhere, so that u, whose
    negative moves x0, falls with -m and the shift is taken back (card 4.1, test b)."""
    shift = 0.3
    method = freeflow(GaussianFlowMap(MU + shift, C))
    method.fake.net = Velocity(Gaussian(PATH, MU + shift, C)).requires_grad_(False)
    method.fake.output = "velocity"
    generator = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(64, *SHAPE, generator=generator) for _ in range(2))
    r = torch.rand(64, generator=generator) * 0.9 + 0.05
    drawn = MU + shift + C * x0
    field, uncertain = method.field(drawn, r, n, Condition())
    exact = -shift * r / ((1 - r).square() * C**2 + r.square())
    torch.testing.assert_close(field, per_sample(exact, field).expand_as(field), atol=1e-4, rtol=1e-3)
    # Its normaliser is how far the teacher's guess is from the velocity of the very pair.
    a, b = (per_sample(value, n) for value in (1 - r, r))
    x_r = a * drawn + b * n
    guess = (x_r - (MU + a * C**2 / (a.square() * C**2 + b.square()) * (x_r - a * MU))) / b
    torch.testing.assert_close(uncertain, (n - drawn - guess).abs().mean((1, 2, 3)), atol=1e-4, rtol=1e-3)

    chosen = freeflow(GaussianFlowMap(MU + shift, C), correction_share=1.0)
    chosen.fake = method.fake
    loss_of(chosen, "student", toy_batch(64))[0].backward()
    assert float(chosen.student.net.mean.grad) > 0


def test_guidance_is_off_at_high_noise_in_the_correction_alone() -> None:
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, 0.2, C))
    goal = 0.2 + 3.0 * (MU - 0.2)
    student = toy_student(GaussianFlowMap(goal, C), PATH, "velocity")
    method = FreeFlow(Copies(teacher, student), (1.0,), FreeFlow.Options(guidance=3.0))
    x, one = toy_batch(32).noise, torch.ones(32)
    assert float(method.prediction(x, one, 0.9 * one, Condition())[1].abs().max()) < 1e-4
    for r, mean in ((0.6, goal), (0.8, MU)):
        method.fake.net = Velocity(Gaussian(PATH, mean, C)).requires_grad_(False)
        method.fake.output = "velocity"
        assert float(method.field(x, r * one, x.flip(0), Condition())[0].abs().max()) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_corrections_guidance_is_the_one_that_was_asked(guidance: float) -> None:
    """The field is 0 where the samples are those of the teacher under that guidance."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, 0.2, C))
    student = toy_student(GaussianFlowMap(MU, C), PATH, "velocity")
    options = FreeFlow.Options(guidance=3.0, correction_guidance=guidance)
    method = FreeFlow(Copies(teacher, student), (1.0,), options)
    method.fake.net, method.fake.output = Velocity(Gaussian(PATH, 0.2 + guidance * (MU - 0.2), C)), "velocity"
    x, half = toy_batch(32).noise, torch.full((32,), 0.5)
    field, _ = method.field(x, half, x.flip(0), Condition())
    assert float(field.abs().max()) < 1e-4
    assert not field.requires_grad


def test_the_loss_is_its_two_parts_in_their_shares() -> None:
    """Half |e|^2 / (|e|^2 + c)^p of a prediction, |.|^2 a mean over elements, whose gradient leaves e a number; of a
    correction the pull against (v_fake - v_T) / mean|v - v_T| at the sample x - t u, lambda times."""
    batch, share = toy_batch(64), 0.25
    method = freeflow(Perceptron(), correction_share=share, correction=2.0, power=0.5, offset=0.01)
    method.fake.net, method.fake.output = Velocity(Gaussian(PATH, MU + 0.3, C)), "velocity"
    method.balance.means.copy_(torch.tensor([3.0, 2.0]))
    options, draws, cond = method.options, batch.draws, Condition()
    x, t = method.starts(batch)
    s = t * logit_normal(draws, "end", options.end_mean, options.end_deviation)
    s = method.read_ends(draws, t, torch.where(draws.uniform("to data") < options.to_data, 0 * s, s))
    r = logit_normal(draws, "renoise t", options.correction_mean, options.correction_deviation)
    n = draws.normal("renoise eps", SHAPE)
    corrected = draws.uniform("kind") < share
    mean, error = method.prediction(x[~corrected], t[~corrected], s[~corrected], cond)
    square = error.square().mean((1, 2, 3))
    weighed = error / per_sample((square + 0.01).sqrt(), error)
    to_data = method.student.flow_velocity(x[corrected], t[corrected], 0 * t[corrected], cond)
    sample = (x[corrected] - per_sample(t[corrected], x) * to_data).detach()
    field, uncertain = method.field(sample, r[corrected], n[corrected], cond)
    field = field / per_sample(uncertain, field)

    loss, logs = loss_of(method, "student", batch)
    value = 0.5 * ((weighed * error).sum() + 3.0 * field.square().sum()) / 2 / 64
    assert loss.item() == pytest.approx(value.item(), rel=1e-4)
    assert float(logs["residual"]) == pytest.approx(float(square.sqrt().mean()), rel=1e-4)
    weights = list(method.student.net.parameters())
    pull = ((weighed.detach() * mean).sum() + 3.0 * (field.detach() * to_data).sum()) / 2 / 64
    for got, wanted in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(pull, weights), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    method.balance.means.zero_()
    method.after_step(method.turn(0))
    sizes = torch.stack(
        [weighed.square().mean((1, 2, 3)).sqrt().mean(), field.square().mean((1, 2, 3)).sqrt().mean()]
    )
    torch.testing.assert_close(method.balance.means, sizes, rtol=1e-4, atol=0)


def test_the_corrections_size_is_tied_to_the_predictions() -> None:
    """lambda is the ratio of running means of both sizes, decay 0.95, as the steps before left them; a batch of one is
    of one kind, and leaves the mean of the other."""
    method = freeflow(GaussianFlowMap(MU + 0.3, C), power=0.0, correction_share=0.5, correction=2.0)
    method.fake.net, method.fake.output = Velocity(Gaussian(PATH, MU + 0.3, C)), "velocity"
    means = [0.0, 0.0]
    for step in range(12):
        _, logs = loss_of(method, "student", toy_batch(1, step))
        wanted = means[0] / means[1] if all(means) else 1.0
        assert float(logs["lambda"]) == pytest.approx(2.0 * wanted, rel=1e-5)
        method.after_step(method.turn(step))
        for i, name in enumerate(("residual", "field")):
            now = float(logs[name])
            means[i] = (0.95 * means[i] + 0.05 * now if means[i] else now) if now else means[i]
    assert all(means)


def test_the_fake_networks_turn_leaves_the_student_alone() -> None:
    method = freeflow(GaussianFlowMap(MU, C), (1.0, 0.6))
    loss_of(method, "fake", toy_batch(8))[0].backward()
    assert all(p.grad is None for p in method.student.net.parameters())
    assert any(p.grad is not None for p in method.fake.net.parameters())


def test_the_balance_is_the_ratio_of_means_and_a_batch_equals_its_parts() -> None:
    """Scaling both sizes leaves it; parts of unlike counts add up to the whole; unseen, it is 1."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(10, generator=generator), torch.rand(6, generator=generator)
    whole, parts = Balance(0.9), Balance(0.9)
    assert float(whole.ratio) == 1
    for scale in (1.0, 5.0):
        whole.see(scale * first, scale * second)
        parts.see(scale * first[:2], scale * second[:0])
        parts.see(scale * first[2:], scale * second)
        assert float(whole.ratio) == float(parts.ratio)  # not within a step
        whole.update()
        parts.update()
        torch.testing.assert_close(whole.means, parts.means)
        assert float(whole.ratio) == pytest.approx(float(first.mean() / second.mean()), rel=1e-5)


def test_a_drawing_starts_where_the_samplers_first_call_is() -> None:
    """On a path that ends before pure noise, jumps of the sampler are jumps of the straight map from there."""
    betas = torch.linspace(0.02, 0.12, 50)
    path = TablePath.from_alphas_cumprod((1 - betas).cumprod(0))
    for own in (path, TrigPath(), FlowPath()):
        student = toy_student(Perceptron(), own, "eps" if own is path else "v" if own != PATH else "velocity")
        z, cond = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)), Condition()
        one, half = torch.ones(8), torch.full((8,), 0.5)
        x, t = on_straight(own, z, one)
        y, s = on_straight(own, student.predict(z, one, cond).at(half), half)
        ours = x - per_sample(t - s, x) * student.flow_velocity(x, t, s, cond)
        torch.testing.assert_close(ours, y, atol=2e-4, rtol=1e-3)
        assert float(t[0]) == pytest.approx(
            1.0 if own is not path else float(STRAIGHT.time_of(path.angle(one))[0])
        )


@pytest.mark.parametrize(("deviation", "bound"), [(0.4, 2e-4), (0.05, 2e-3), (0.01, 5e-3), (0.003, 5e-3)])
def test_prediction_is_right_at_the_jump_that_is_sampled(deviation: float, bound: float) -> None:
    """s = 0, for data as fine as the least time at which the teacher is read; read there at the state of time 0 it
    would be off by 0.02, 0.2, 0.6 and 0.7."""
    teacher = ToyTeacher(Gaussian(PATH, MU, deviation), PATH)
    student = toy_student(GaussianFlowMap(MU, deviation), PATH, "velocity")
    method = FreeFlow(Copies(teacher, student), (1.0,), FreeFlow.Options(guidance=1.0))
    x, t = method.starts(toy_batch(64))
    for s in (0.0, method.least):
        error = method.prediction(x, t, torch.full_like(t, s), Condition())[1]
        assert float(error.square().mean().sqrt()) < bound


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.6)])
def test_the_warm_start_is_regression_on_the_trajectories_mean_velocity(times: tuple[float, ...]) -> None:
    """Zero at the exact map, for jumps between any two kept states."""
    exact = GaussianFlowMap(MU, C)
    method = freeflow(exact, times, warm_start=10)
    assert method.options.needs == {"noise", "prompts", "pairs", "states"}
    plain = toy_batch(64, pairs=lambda z: MU + C * z)
    z = plain.pairs.noise
    s = torch.full((64,), 0.6)
    between = (z - 0.4 * exact(z, torch.ones(64), Condition({"gap": 1 - s})))[:, None]
    pairs = Examples(plain.pairs.x0, Condition(), z, between.detach() if len(times) > 1 else None)
    batch = replace(plain, pairs=pairs)
    assert method.turn(0).network == "student" and method.turn(10).network == "fake"
    with torch.no_grad():
        assert float(loss_of(method, "student", batch)[0]) < 1e-9
        exact.mean += 0.1
        assert float(loss_of(method, "student", batch)[0]) > 5e-3


@pytest.mark.parametrize("kind", [FreeFlow, FlowMap])
def test_on_whole_trajectories_it_is_zero_at_the_exact_map_also_for_jumps_of_no_length(
    kind: type[FlowMapMethod],
) -> None:
    """Data at one point: every trajectory is a straight line, known from any states; 0.6 is none of their times."""
    exact = GaussianFlowMap(MU, 1e-4)
    options = kind.Options(warm_start=10, warm_times="all", pair_steps=4)
    method = kind(
        Copies(ToyTeacher(Gaussian(PATH, MU, 1e-4), PATH), toy_student(exact, PATH, "velocity")),
        (1.0, 0.6),
        options,
    )
    plain = toy_batch(64, pairs=lambda z: MU + 0 * z)
    z, x0 = plain.pairs.noise, plain.pairs.x0
    assert method.pair_times() == (0.75, 0.5, 0.25)
    states = torch.stack([t * z + (1 - t) * x0 for t in method.pair_times()], 1)
    batch = replace(plain, pairs=Examples(x0, Condition(), z, states))
    asked: list[float] = []
    exact.register_forward_pre_hook(lambda _, given: asked.extend(given[1].tolist()))
    with torch.no_grad():
        assert float(loss_of(method, "student", batch)[0]) < 1e-5
        if kind is FreeFlow:  # its jumps start where the student's steps do
            assert {round(t, 6) for t in asked} == {1.0, 0.6}
        exact.mean += 0.1
        assert float(loss_of(method, "student", batch)[0]) > 5e-3


@pytest.mark.slow
def test_training_without_data_brings_the_student_to_the_trajectories_end() -> None:
    """Both networks learn, from noise alone; one step of the teacher's weights gives its mean at the start."""
    method = from_the_teacher(FreeFlow, FreeFlow.Options(guidance=1.0, derivative="difference"))
    start, end = errors(method, steps=700)
    assert end < 0.5 * start, (start, end)


class Sealed(Batch):
    """A batch whose images and pairs raise."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("images", "pairs"):
            raise AssertionError(f"a data-free method asked for {name}")
        return super().__getattribute__(name)

    def split(self, parts: int) -> list[Batch]:
        assert parts == 1
        return [self]


class SealedData(Data):
    """Training data that hands out sealed batches."""

    def batch(self, step: int, first: int, count: int, size: int) -> Batch:
        plain = super().batch(step, first, count, size)
        assert plain.images is None and plain.pairs is None
        return Sealed(plain.draws, plain.shape, plain.cond, plain.prompt)


@pytest.mark.parametrize("method", ["freeflow", "sim"])
def test_it_trains_with_no_data_to_load_and_the_network_unplugged(
    method: str, tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders of images and pairs raise, as do sockets; the data folder named in the recipe does not exist."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a data-free method loads nothing")

    here = HERE
    recipe = load_recipe(
        here / "empty.yaml",
        method=method,
        sets=[
            f"data.prompts={here / 'prompts.txt'}", f"data.images={tmp_path}/absent",
            f"data.pairs={tmp_path}/absent", "train.updates=6", "train.batch=4",
            "train.preview_every=0", "train.checkpoint_every=6", "train.lr=1e-4", "options.guidance=2.0",
            "evaluate=false",
        ],
    )  # fmt: skip
    pipeline = tiny_pipeline("sd")
    for kind, name in (
        (EmbeddedImages, "read"),
        (ImageFolder, "read"),
        (PairCache, "__init__"),
        (socket, "socket"),
    ):
        monkeypatch.setattr(kind, name, refuse)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, pipeline)
    start = {name: value.clone() for name, value in job.student.net.state_dict().items()}
    data = SealedData(job.teacher, job.prompts, recipe.train.seed)
    assert training_data(job, tmp_path).images is None  # what the recipe itself would have loaded
    trained = train(job.objective, data, recipe, tmp_path, accelerator)
    assert trained.step == 6
    assert any(not torch.equal(value, start[name]) for name, value in job.student.net.state_dict().items())
    assert not (tmp_path / "absent").exists()
