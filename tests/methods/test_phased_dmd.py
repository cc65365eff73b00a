"""Phased DMD: its target by quadrature, its field in closed form, its phases, and its export (card 10)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import shaken, tiny_prompts
from torch import nn

from stepdistill.diffusion.path import EDMPath, FlowPath, TrigPath, per_sample
from stepdistill.errors import UserError
from stepdistill.export.card import STOCK, for_folder, model_card
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import VERIFICATION, export
from stepdistill.export.verify import verify
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import denoising_loss
from stepdistill.losses.subinterval import scaled_target
from stepdistill.methods.diff_instruct import DiffInstruct
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.system.files import sha256_of
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.parallel import take_turn

MU, S = 0.7, 0.8
PATHS = [FlowPath(), TrigPath(), EDMPath()]
KINDS = ("x0", "eps", "v", "velocity")


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def phased(path=FlowPath(), times=(1.0, 0.5), net=None, output="x0", **options):  # noqa: B008
    """Phased DMD of a Gaussian teacher."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    student = toy_student(net or Affine(0.0, 1.0), path, output)
    return PhasedDMD(Copies(teacher, student), times, PhasedDMD.Options(**{"guidance": 1.0, **options}))


# --- the subinterval target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_kernel_joins_the_marginals_and_the_targets_explain_x_t(path):
    """a alpha_s = alpha_t, a^2 sigma_s^2 + c^2 = sigma_t^2, and alpha_t x0* + sigma_t eps* = x_t at every s < t."""
    s, t = column(0.1, 0.3, 0.5, 0.62), column(0.4, 0.9, 0.8, 0.63)
    ratio, spread = path.kernel(s, t)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.alpha_sigma(s), path.alpha_sigma(t)
    torch.testing.assert_close(ratio * alpha_s, alpha_t)
    torch.testing.assert_close((ratio * sigma_s) ** 2 + spread**2, sigma_t**2)
    x_s, eps = column(0.3, -1.2, 2.0, 0.1), column(-0.4, 1.1, 0.2, -2.0)
    x0, noise = (scaled_target(path, x_s, s, t, eps, kind) / spread for kind in ("x0", "eps"))
    torch.testing.assert_close(alpha_t * x0 + sigma_t * noise, ratio * x_s + spread * eps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_whole_interval_it_is_the_ordinary_target(path, kind):
    t, x0, eps = column(0.2, 0.5, 0.9), column(1.0, -0.5, 2.0), column(0.3, -1.0, 0.2)
    s = torch.zeros_like(t)
    _, spread = path.kernel(s, t)
    torch.testing.assert_close(
        scaled_target(path, x0, s, t, eps, kind) / spread, path.target(x0, eps, t, kind)
    )


def test_two_forms_of_the_flow_target_agree():
    """((alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 c)) eps - x_s / alpha_s = (sigma_t eps / c - x_t) / alpha_t
    (eq. 12 and its second form)."""
    path, s, t = FlowPath(), column(0.5, 0.2), column(0.8, 0.9)
    x_s, eps = column(0.4, -1.0), column(1.3, 0.2)
    ratio, c = path.kernel(s, t)
    first = ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * c) * eps - x_s / (1 - s)
    second = (t * eps / c - (ratio * x_s + c * eps)) / (1 - t)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    ours = scaled_target(path, x_s, s, t, eps, "velocity") / c
    torch.testing.assert_close(ours, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()])
def test_its_mean_given_x_t_is_the_marginal_velocity_and_that_of_the_plain_one_is_not(path):
    """x0 in {-1, 0, 1, 2}, s = 0.5, t = 0.8, by quadrature over x_s given x_t; that of (x_s, eps) is off by 0.1."""
    s, t, atoms = column(0.5), column(0.8), column(-1, 0, 1, 2)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.alpha_sigma(s), path.alpha_sigma(t)
    ratio, c = path.kernel(s, t)
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-((grid[:, None] - alpha_s * atoms) ** 2) / (2 * sigma_s**2)).sum(1)
    wrong = 0.0
    for x_t in (-0.7, 0.1, 0.9):
        posterior = density * torch.exp(-((x_t - ratio * grid) ** 2) / (2 * c**2))
        posterior /= posterior.sum()
        eps = (x_t - ratio * grid) / c
        many = (torch.full_like(grid, 0.5), torch.full_like(grid, 0.8))
        target = scaled_target(path, grid, *many, eps, "velocity") / c
        weight = torch.softmax(-((x_t - alpha_t * atoms) ** 2) / (2 * sigma_t**2), 0)
        x0 = (weight * atoms).sum()
        exact = path.target(x0, (x_t - alpha_t * x0) / sigma_t, t, "velocity")
        assert float((posterior * target).sum()) == pytest.approx(float(exact), abs=1e-6)
        naive = path.target(grid, eps, many[1], "velocity")
        wrong = max(wrong, abs(float((posterior * naive).sum()) - float(exact)))
    assert wrong > 0.1


# --- the student's field -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_field_is_the_gradient_of_the_kl_in_closed_form(path, shift):
    """States of mean m_s, the teacher's spread: a (a m_s - alpha_t mu) / V_t everywhere, zero at m_s = alpha_s mu."""
    method, batch = phased(path), toy_batch(16)
    method.fake.net = Gaussian(path, MU + shift, S)
    field = method.field(torch.randn(16, *SHAPE), batch, since=0.5)
    t, s = 0.5 + 0.5 * batch.draws.uniform("score t", 0.02, 0.98), torch.full((16,), 0.5)
    (alpha, sigma), (alpha_s, _) = path.alpha_sigma(t), path.alpha_sigma(s)
    ratio, m_s = path.kernel(s, t)[0], alpha_s * (MU + shift)
    expected = ratio * (ratio * m_s - alpha * MU) / (alpha**2 * S**2 + sigma**2)
    torch.testing.assert_close(field.flatten(1), expected[:, None].expand(-1, 2), rtol=1e-3, atol=1e-5)


def test_the_field_is_read_at_states_that_are_noised_from_the_phases_end():
    """x_t = a x_s + c eps, where scores of two spreads differ by (x_t - alpha mu) (1 / V - 1 / V')."""
    path, batch, other = FlowPath(), toy_batch(16), 1.3
    method = phased(path)
    method.fake.net = Gaussian(path, MU, other)
    x_s = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, s = 0.5 + 0.5 * batch.draws.uniform("score t", 0.02, 0.98), torch.full((16,), 0.5)
    ratio, spread = (per_sample(value, x_s) for value in path.kernel(s, t))
    alpha, sigma = (per_sample(value, x_s) for value in path.alpha_sigma(t))
    x_t = ratio * x_s + spread * batch.draws.normal("score eps", SHAPE)
    one, two = ((alpha * deviation) ** 2 + sigma**2 for deviation in (S, other))
    expected = ratio * (x_t - alpha * MU) * (1 / one - 1 / two)
    torch.testing.assert_close(method.field(x_s, batch, since=0.5), expected, rtol=1e-3, atol=1e-5)


def test_one_phase_of_one_step_is_the_plain_kl_of_diff_instruct():
    path, batch = FlowPath(), toy_batch(32)
    one = phased(times=(1.0,), net=Affine(0.1, 1.2), phases=1)
    options = DiffInstruct.Options(weight="kl")
    plain = DiffInstruct(Copies(one.teacher, toy_student(Affine(0.1, 1.2), path)), (1.0,), options)
    for method in (one, plain):
        method.fake.net = Gaussian(path, -0.2, 1.1)
    loss, other = (loss_of(method, "student", batch)[0] for method in (one, plain))
    torch.testing.assert_close(loss, other)
    loss.backward(), other.backward()
    shifts = (one.student.experts[0].net.shift.grad, plain.student.net.shift.grad)
    torch.testing.assert_close(*shifts)
    assert shifts[0] != 0


@pytest.mark.parametrize("kind", ["output", "x0"])
def test_the_fakes_loss_on_the_whole_interval_is_the_ordinary_one(kind):
    """Without a clamp; of a network that says velocities, so that the two kinds differ."""
    options = PhasedDMD.Options(guidance=1.0, phases=1, clamp=math.inf, fake_loss=kind)
    teacher = ToyTeacher(Perceptron(), FlowPath(), "velocity")
    student = toy_student(Perceptron(seed=1), FlowPath(), "velocity")
    method, batch = PhasedDMD(Copies(teacher, student), (1.0,), options), toy_batch(32)
    x = method.generate(batch, 0).detach()
    torch.testing.assert_close(loss_of(method, "fake", batch)[0], denoising_loss(method.fake, x, batch, kind))


def test_the_fakes_loss_is_clamped_where_t_meets_s():
    """At s = 0.5 the error of each sample in its own target has weight min(1, clamp c^2), by hand on the flow path."""
    method, batch, s = phased(clamp=3.0), toy_batch(64), 0.5
    x_s = method.generate(batch, 0).detach()
    t, eps = s + (1 - s) * batch.draws.uniform("fake t"), batch.draws.normal("fake eps", SHAPE)
    ratio = (1 - t) / (1 - s)
    c = (t**2 - (ratio * s) ** 2).sqrt()
    x_t = per_sample(ratio, x_s) * x_s + per_sample(c, x_s) * eps
    target = x_s / (1 - s) - per_sample((1 - t) * s**2 / ((1 - s) ** 2 * c), x_s) * eps
    error = (method.fake.predict(x_t, t, batch.cond).x0 - target).square().flatten(1).mean(1)
    weight = (3.0 * c**2).clamp_max(1)
    assert 0.1 < float((weight < 1).float().mean()) < 0.9
    loss, _ = loss_of(method, "fake", batch)
    assert float(loss.detach()) == pytest.approx(float((weight * error).mean().detach()), rel=1e-3)
    t = torch.full((2000,), 0.001)
    assert bool(torch.isfinite(scaled_target(FlowPath(), t, t, t, t, "eps")).all())  # where t meets s


# --- phases ------------------------------------------------------------------------------------------------------

FOUR = (1.0, 0.75, 0.5, 0.25)


def test_phases_take_turns_and_the_fake_network_starts_anew():
    method = phased(times=FOUR, phase_updates=2, fake_updates=2, warm_start=1)
    turns = [method.turn(step).network for step in range(16)]
    fake = ["fake"] * 2
    assert turns[:7] == ["expert-1", *fake, "expert-1", *fake, "expert-1"]
    assert turns[7:14] == [turn.replace("expert-1", "student") for turn in turns[:7]]
    assert turns[14:] == fake  # the last phase goes on
    ahead = phased(times=FOUR, phase_updates=2, fake_updates=2, warm_start=1, fake_warm_start=3)
    assert [ahead.turn(step).network for step in range(4)] == ["expert-1", "fake", "fake", "fake"]
    assert [ahead.place(step) for step in (9, 10, 20)] == [(0, 9), (1, 0), (1, 10)]  # 1 + 3 + 2 * 3 a phase
    assert list(modules_of(method)) == ["expert-1", "student", "fake"]
    assert [one.span for one in method.trained().values()] == [(0, 2), (2, 4), None]
    assert [method.end(phase) for phase in (0, 1)] == [0.5, 0.0]
    with torch.no_grad():
        method.fake.net.mean += 1
    for step in range(6):
        method.after_step(method.turn(step))
    assert method.fake.net.mean.item() == pytest.approx(MU + 1)
    method.after_step(method.turn(6))
    assert method.fake.net.mean.item() == pytest.approx(MU)
    with pytest.raises(UserError, match=r"options\.phases is 3, but student\.times has 2"):
        phased(phases=3)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 180, 181, 182, 183])
def test_a_phase_ends_where_the_sampler_arrives_and_reaches_its_expert_alone(step):
    """From the phase's last step the state is the sampler's own at s; only that expert has gradients."""
    method, batch = phased(times=FOUR, net=Perceptron(), output="velocity"), toy_batch(8, step)
    shaken(method.student.experts[1].net)
    phase, sampler = step // 180, method.sampler()
    x_s = method.generate(batch, phase)
    exit = (2 * phase) + batch.draws.shared_integer("exit", 2)
    if exit == 2 * phase + 1:
        draw = sampler.draw if phase else lambda *a: sampler.walk(*a, 2)
        torch.testing.assert_close(x_s, draw(method.student, batch.noise, batch.cond, batch.fresh))
    turn = ("expert-1", "student")[phase]
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    take_turn(trained, turn)
    loss_of(method, turn, batch)[0].backward()
    assert {name for name, values in trained.items() if any(p.grad is not None for p in values)} == {turn}


def test_only_the_last_call_of_a_phase_has_a_graph():
    method, ends = phased(times=FOUR, net=Perceptron(), output="velocity", phase_updates=90), set()
    for step in range(6):
        graphs = []
        expert = modules_of(method)["expert-1"]
        hook = expert.register_forward_hook(lambda m, a, out, seen=graphs: seen.append(out.requires_grad))
        x_s = method.generate(toy_batch(4, step), 0)
        hook.remove()
        assert graphs == [False] * (len(graphs) - 1) + [True] and x_s.requires_grad
        ends.add(len(graphs))
    assert ends == {1, 2}
    logs = loss_of(method, "expert-1", toy_batch(4, 1))[1]
    assert not any(value.requires_grad for value in logs.values())


def test_experts_answer_for_their_own_times_in_a_mixed_batch():
    method = phased(times=FOUR, net=Perceptron(), output="velocity")
    shaken(method.student.experts[1].net)
    x, t, cond = torch.randn(6, *SHAPE), torch.tensor([1.0, 0.2, 0.75, 0.5, 0.6, 0.63]), toy_batch(6).cond
    said = method.student.raw(x, t, cond)
    for i, expert in enumerate([0, 1, 0, 1, 1, 0]):  # the bound is midway between 0.75 and 0.5
        alone = method.student.experts[expert].net(x[i : i + 1], t[i : i + 1], cond)
        torch.testing.assert_close(said[i : i + 1], alone)


def test_warm_start_regresses_each_expert_at_its_own_times():
    method = phased(warm_start=2)
    assert method.options.needs == {"noise", "prompts", "pairs", "states"}
    assert PhasedDMD.Options().needs == {"noise", "prompts"}
    batch = toy_batch(8, 0, pairs=lambda z: MU + S * z)
    with torch.no_grad():
        method.student.experts[0].net.shift.fill_(MU)
        method.student.experts[0].net.scale.fill_(S)
    assert loss_of(method, "expert-1", batch)[0].item() == pytest.approx(0.0, abs=1e-12)
    assert method.lr_ratio(Turn("expert-1", 0)) == method.options.warm_start_lr_ratio
    assert method.lr_ratio(Turn("expert-1", 1)) == pytest.approx(0.5)


def test_training_phase_after_phase_brings_a_gaussian_student_home():
    """Each expert closes at least half the gap of the mean and deviation of its states to the teacher's."""
    method = phased(net=Affine(-0.5, 0.9), phase_updates=100, fake_updates=2)
    optimizers = {
        name: torch.optim.Adam(net.parameters(), lr=0.03, betas=(0.5, 0.9))
        for name, net in modules_of(method).items()
    }

    def errors():
        with torch.no_grad():
            batch = toy_batch(400, 10_000)
            states = [method.sampler().walk(method.student, batch.noise, batch.cond, batch.fresh, 1)]
            states += [method.sampler().draw(method.student, batch.noise, batch.cond, batch.fresh)]
        goals = ((MU / 2, math.sqrt(S**2 + 1) / 2), (MU, S))
        return [
            abs(float(x.mean()) - mean) + abs(float(x.std()) - deviation)
            for x, (mean, deviation) in zip(states, goals, strict=True)
        ]

    before = errors()
    for step in range(600):
        turn = method.turn(step).network
        optimizers[turn].zero_grad()
        loss_of(method, turn, toy_batch(16, step))[0].backward()
        optimizers[turn].step()
        method.after_step(method.turn(step))
    assert all(after < 0.5 * start for after, start in zip(errors(), before, strict=True)), (before, errors())


# --- export ------------------------------------------------------------------------------------------------------


def test_experts_on_one_network_share_all_but_their_adapters(teacher_of):
    roles = Adapters(teacher_of("unet-ddpm"), 2)
    method = PhasedDMD(roles, FOUR, PhasedDMD.Options(guidance=1.0))
    first, last = method.student.experts
    assert roles.names == ("student", "expert-1", "fake") and last is roles.student
    assert first.net is last.net is method.fake.net and len(roles.stored()) == 1
    own = [{id(value) for value in roles.parameters(name)} for name in roles.names]
    assert len(set.union(*own)) == sum(map(len, own))
    method.roles.become("fake", "student")
    for step in range(400):  # into the second phase: the fake network is the teacher again
        method.after_step(method.turn(step))
    x, t, cond = (
        torch.randn(2, *method.teacher.codec.shape),
        torch.tensor([0.9, 0.3]),
        method.teacher.codec.encode(["0", "1"]),
    )
    shaken(nn.ParameterList(roles.parameters("expert-1")), amount=3.0)
    with torch.no_grad():
        said, teacher = method.student.raw(x, t, cond), method.teacher.denoiser.raw(x, t, cond)
        assert torch.equal(method.fake.raw(x, t, cond), teacher)
    assert not torch.equal(said[0], teacher[0])
    torch.testing.assert_close(said[1], teacher[1], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def exported(teacher_of, tmp_path_factory):
    """A phased LoRA student of the tiny Stable Diffusion, and its folder."""
    teacher, folder = teacher_of("sd"), tmp_path_factory.mktemp("phased") / "student"
    method = PhasedDMD(Adapters(teacher, 2, 6.0), FOUR, PhasedDMD.Options())
    student = method.student
    for i, name in enumerate(("expert-1", "student")):
        shaken(nn.ParameterList(method.roles.parameters(name)), amount=3.0, seed=i)
    sampler = on_stock_grid(method.sampler(), teacher.path, teacher.pipe.scheduler)
    card = model_card(
        grid="",
        teacher="sd",
        method="phased_dmd",
        summary="",
        steps=4,
        guidance=4.0,
        call={"prompt": ["x"]},
        command="",
    )
    assert STOCK in card
    export(student, sampler, teacher, folder, tiny_prompts("sd", 2), card, seeds=(0, 1))
    return student, folder


def load(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, folder):
    manifest = json.loads((folder / VERIFICATION / "manifest.json").read_text())
    generators = [torch.Generator().manual_seed(seed) for seed in manifest["seeds"]]
    return np.asarray(pipe(**manifest["call"], generator=generators, output_type="np").images) * 255


def test_a_stock_pipeline_switches_experts_by_step(exported, tmp_path):
    student, folder = exported
    kept = np.stack([np.asarray(Image.open(folder / VERIFICATION / f"{i}.png")) for i in range(2)])
    pipe = load(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    for net, own in zip(pipe.unet.experts, student.experts, strict=True):
        merged = own.plain_net().state_dict()
        assert own.adapter and all(torch.equal(net.state_dict()[key], merged[key]) for key in merged)
    calls = []
    for i, net in enumerate(pipe.unet.experts):
        net.register_forward_hook(lambda m, a, out, i=i: calls.append(i))
    assert np.abs(pictures(pipe, folder) - kept).max() <= 1
    assert calls == [0, 0, 1, 1]
    # Saved by the reader and loaded again, it still has its code.
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["unet"] == ["phased_experts", "PhasedExperts"]
    assert np.abs(pictures(load(tmp_path / "again"), folder) - kept).max() <= 1
    # With one expert at all steps the pictures are others.
    pipe.unet.experts[1] = pipe.unet.experts[0]
    assert np.abs(pictures(pipe, folder) - kept).max() > 8
    with pytest.raises(ValueError, match="belong to 2 experts"):
        pipe.unet(torch.zeros(2, 4, 8, 8), torch.tensor([999, 1]))


def test_the_card_says_that_code_travels_and_why(exported):
    _, folder = exported
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert "`unet/phased_experts.py`" in card and "no stock diffusers class changes weights" in card
    assert STOCK not in card and for_folder(card, folder) == card
    assert sorted(path.parent.name for path in folder.rglob("pytorch_lora_weights.safetensors")) == [
        "expert-1",
        "expert-2",
    ]


@pytest.mark.slow
def test_verify_passes_in_a_process_without_stepdistill(exported):
    found = verify(exported[1])
    assert found.images == 2 and found.steps == 4 and found.worst <= 1


def test_foreign_code_is_not_run(exported, tmp_path: Path):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(exported[1], folder)
    file = folder / "unet" / "phased_experts.py"
    file.write_text(file.read_text() + "\nraise SystemExit\n")
    manifest = folder / VERIFICATION / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["unet/phased_experts.py"] = sha256_of(file)
    manifest.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"carries unet/phased_experts\.py, which is not a file this stepdistill ships"
    ):
        verify(folder)
