"""Terms that a recipe adds to any method, the two kinds of averages, and the guidance interval."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from torch import nn
from toy import Gaussian, GaussianFlowMap, Mixture, Perceptron, ToyTeacher, toy_batch, toy_student

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.losses.regression import ends
from stepdistill.losses.terms import WithTerms
from stepdistill.methods import find_method, method_names
from stepdistill.methods.flow_map import FlowMap
from stepdistill.networks.averages import Ema
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.sections import TermOptions
from stepdistill.training.assemble import assemble, training_data
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train

PATH = FlowPath()


def plain(name="reflow", times=(1.0,)):
    kind = find_method(name)
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    return kind(teacher, toy_student(Perceptron(seed=1), PATH, "velocity"), times, kind.Options())


def batch(step=0):
    images = Mixture(PATH).sample(8, torch.Generator().manual_seed(7))
    return toy_batch(8, step, pairs=lambda z: 0.3 * z + 0.1, images=images)


def direction(latents):
    """Unit features of toy latents."""
    return nn.functional.normalize(latents.flatten(1) + 2, dim=1)


def test_terms_add_to_the_methods_own_loss():
    terms = TermOptions(regression_weight=0.5, regression="l1", perceptual_weight=0.25)
    method = WithTerms(plain(), terms, direction)
    total, logs = method.loss("student", batch())
    own, _ = method.method.loss("student", batch())
    sample = batch()
    seen = method.student.predict(sample.pairs.noise, torch.ones(8), sample.pairs.cond).x0
    regression = (seen - sample.pairs.x0).abs().mean()
    cosine = (direction(seen) * direction(sample.pairs.x0)).sum(1)
    assert float(logs["term regression"]) == pytest.approx(float(regression), rel=1e-6)
    assert float(logs["term perceptual"]) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)
    assert float(total) == pytest.approx(
        float(own + 0.5 * regression + 0.25 * (2 - 2 * cosine).mean()), rel=1e-5
    )


def test_terms_vanish_with_their_gradient_at_the_exact_student():
    method = WithTerms(plain(), TermOptions(regression_weight=1.0, perceptual_weight=1.0), direction)
    exact = method.student

    def land(z):
        with torch.no_grad():
            return exact.predict(z, torch.ones(len(z)), batch().cond).x0

    _, logs = method.loss("student", toy_batch(8, pairs=land))
    for name in ("term regression", "term perceptual"):
        gradients = torch.autograd.grad(logs[name], list(exact.net.parameters()), retain_graph=True)
        assert float(logs[name].detach()) == pytest.approx(0, abs=1e-10)
        assert all(float(gradient.abs().max()) < 1e-4 for gradient in gradients)


def test_the_regression_reads_each_state_at_its_own_time():
    """A flow map's pairs keep more states than the student has times. On straight trajectories the state at t is
    t z + (1 - t) x, so one read at another time shows."""
    kind = find_method("flow_map")
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = kind(teacher, student, (1.0, 0.5), kind.Options(warm_times=(0.75, 0.25)))
    assert method.pair_times() == (0.75, 0.5, 0.25)
    sample, asked = batch(), []
    pairs = sample.pairs
    states = torch.stack([t * pairs.noise + (1 - t) * pairs.x0 for t in method.pair_times()], 1)
    sample = replace(sample, pairs=replace(pairs, states=states))
    predict = student.predict

    def watched(x, t, cond, s=None):
        asked.append((x, t))
        return predict(x, t, cond, s)

    student.predict = watched
    terms = WithTerms(method, TermOptions(regression_weight=1.0))
    terms.loss("student", sample)
    x, t = asked[-1]
    line = t.view(-1, 1, 1, 1) * pairs.noise + (1 - t.view(-1, 1, 1, 1)) * pairs.x0
    torch.testing.assert_close(x, line)
    assert len(set(t.tolist())) > 2


@pytest.mark.parametrize("name", ["dmd", "reflow"])
def test_the_discriminators_turns_come_between_the_methods_own(name):
    """Without them the sequence of turns, rates and losses is that of the method alone."""
    alone, method = plain(name), WithTerms(plain(name), TermOptions(gan_weight=1e-9, gan_lr_ratio=3.0))
    turns = [method.turn(step) for step in range(24)]
    assert turns[::2] == ["discriminator"] * 12
    assert turns[1::2] == [alone.turn(step) for step in range(12)]
    assert {method.lr_ratio("discriminator", step) for step in range(0, 24, 2)} == {3.0}
    for step in range(12):
        turn = alone.turn(step)
        loss, _ = method.loss(turn, batch(2 * step + 1))
        own = alone.loss(turn, batch_at(step))[0]
        assert turn == "fake" or float(loss) == pytest.approx(float(own), rel=1e-4, abs=1e-6)


def batch_at(step):
    """The batch of the run's step 2 step + 1 as the method's step ``step``."""
    sample = batch(2 * step + 1)
    return replace(sample, draws=replace(sample.draws, step=step))


def test_what_the_perceptual_term_wants_holds_no_graph():
    """Also where the embedding network has weights that are not frozen: only the student's own features do."""
    loud, seen = nn.Parameter(torch.ones(())), []

    def embed(latents):
        seen.append(loud * direction(latents))
        return seen[-1]

    WithTerms(plain(), TermOptions(perceptual_weight=1.0), embed).loss("student", batch())
    assert [features.requires_grad for features in seen] == [False, True]


class Counted(find_method("reflow")):
    """Keeps the steps it is told, and logs that are not to be written to."""

    def __init__(self, *given):
        super().__init__(*given)
        self.steps = []

    def loss(self, turn, batch):
        return super().loss(turn, batch)[0], MappingProxyType({})

    def after_step(self, step):
        self.steps.append(step)

    def anew(self, step):
        return frozenset({f"anew {step}"})


def counted(**terms):
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    return WithTerms(Counted(teacher, student, (1.0,), Counted.Options()), TermOptions(**terms))


def test_a_method_is_told_its_own_steps_alone():
    with_gan, without = counted(gan_weight=0.1), counted(regression_weight=0.1)
    for step in range(6):
        own = step // 2
        assert with_gan.anew(step) == ({f"anew {own}"} if step % 2 else set())
        assert without.anew(step) == {f"anew {step}"}
        with_gan.after_step(step)
        without.after_step(step)
    assert with_gan.method.steps == [0, 1, 2] and without.method.steps == list(range(6))
    assert set(with_gan.networks()) == {"student", "discriminator"} and set(without.networks()) == {"student"}
    assert with_gan.networks()["discriminator"] is with_gan.gan
    assert set(with_gan.loss("student", batch(1))[1]) == {"term gan"}
    assert set(without.loss("student", batch(1))[1]) == {"term regression"}


@pytest.mark.parametrize(("name", "times"), [("dmd", (1.0, 0.5)), ("flow_map", (1.0, 0.5)), ("lcm", (1.0,))])
def test_the_gans_samples_are_those_that_are_drawn_and_its_gradient_that_of_the_last_call(name, times):
    method = WithTerms(plain(name, times), TermOptions(gan_weight=1.0))
    sample, sampler = batch(1), method.sampler()
    made = method.sample(sample)
    with torch.no_grad():
        drawn = sampler.draw(method.student, sample.noise, sample.cond, sample.fresh)
        start = sampler.walk(method.student, sample.noise, sample.cond, sample.fresh, len(times) - 1)
    assert torch.equal(made, drawn)
    t = torch.full((8,), times[-1])
    end = (torch.zeros(8),) if method.student.two_times else ()
    last = method.student.predict(start, t, sample.cond, *end).x0
    parameters = list(method.student.net.parameters())
    for one, two in zip(
        torch.autograd.grad(made.sum(), parameters), torch.autograd.grad(last.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(one, two)
    method.loss("discriminator", sample)[0].backward()
    assert all(p.grad is None for p in parameters)
    assert all(p.grad is not None for p in method.gan.parameters())


def test_one_expert_for_all_calls_takes_a_gan():
    kind = find_method("phased_dmd")
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = kind(teacher, student, (1.0, 0.5), kind.Options(phases=1))
    assert method.span("student") == (0, 2)
    assert "discriminator" in WithTerms(method, TermOptions(gan_weight=0.5)).networks()


@pytest.mark.parametrize("name", method_names())
def test_any_method_takes_them(name):
    kind = find_method(name)
    times = (1.0, 0.5) if len(kind.default_times) > 1 else (1.0,)
    gan = name != "phased_dmd"  # whose experts draw no clean sample, but for the last
    method = WithTerms(plain(name, times), TermOptions(regression_weight=1.0, gan_weight=float(gan)))
    turn = next(
        turn for step in range(1, 400) if (turn := method.turn(step)) not in ("fake", "discriminator")
    )
    sample = batch(1)
    if len(times) > 1:
        pairs = sample.pairs
        states = (0.5 * pairs.noise + 0.5 * pairs.x0)[:, None]
        sample = type(sample)(
            sample.draws,
            sample.noise,
            sample.cond,
            sample.images,
            type(pairs)(pairs.x0, pairs.cond, pairs.noise, states),
        )
    wanted = [(turn, {"term regression"} | ({"term gan"} if gan else set()))]
    for which, names in [*wanted, *([("discriminator", {"discriminator"})] if gan else [])]:
        loss, logs = method.loss(which, sample)
        assert names <= set(logs) and bool(torch.isfinite(loss))


def test_of_several_experts_the_one_that_is_trained_has_the_whole_term():
    """Phased DMD: in an expert's turn the regression reads that expert's calls alone, and all of its gradient is that
    expert's. A GAN, which would have none in an early expert, is refused."""
    times = (1.0, 0.75, 0.5, 0.25)
    kind = find_method("phased_dmd")
    options = kind.Options(phase_updates=1, fake_steps=1)

    def experts():
        teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
        return kind(teacher, toy_student(Perceptron(seed=1), PATH, "velocity"), times, options)

    method = WithTerms(experts(), TermOptions(regression_weight=1.0))
    sample = batch()
    pairs = sample.pairs
    states = torch.stack([t * pairs.noise + (1 - t) * pairs.x0 for t in times[1:]], 1)
    sample = replace(sample, pairs=replace(pairs, states=states))
    nets = dict(zip(("expert-1", "student"), method.student.net.nets, strict=True))
    for turn, own in (("expert-1", (0, 1)), ("student", (2, 3))):
        step = next(step for step in range(9) if method.turn(step) == turn)
        _, logs = method.loss(turn, replace(sample, draws=replace(sample.draws, step=step)))
        method.zero_grad(set_to_none=True)
        logs["term regression"].backward()
        assert {name for name, net in nets.items() if any(p.grad is not None for p in net.parameters())} == {
            turn
        }
        assert method.method.span(turn) == (own[0], own[1] + 1)
    with pytest.raises(
        UserError, match=r"terms\.gan_weight is 0\.5, but expert-1 draws no clean sample to be told"
    ):
        WithTerms(experts(), TermOptions(gan_weight=0.5))


def test_a_run_with_every_term_on_the_embedded_teacher(tmp_path):
    sets = [
        f"data.prompts={HERE / 'prompts.txt'}", "train.steps=4", "train.batch=4", "train.sheet_every=0",
        "options.pairs=8", "options.pair_steps=4", "options.guidance=2.0", "student.times=[1.0, 0.5]", "evaluate=false",
        "terms.regression_weight=0.1", "terms.perceptual_weight=0.1", "terms.gan_weight=0.01",
        "train.ema_power=6.94",
    ]  # fmt: skip
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(load_recipe(HERE / "empty.yaml", method="lcm", sets=sets)), accelerator, None)
    assert job.needs >= {"pairs", "states", "images"}
    before = {name: value.clone() for name, value in job.teacher.denoiser.net.state_dict().items()}
    trained = train(job.method, training_data(job, tmp_path), job.recipe, tmp_path, accelerator)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["turn"] for row in rows] == ["discriminator", "student"] * 2
    assert {"term regression", "term perceptual", "term gan"} <= set(rows[1])
    assert 0 < rows[1]["term perceptual"] < 4
    after = job.teacher.denoiser.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert trained.ema is not None and trained.ema.updates == 2


def test_only_networks_with_a_graph_can_be_perceptual():
    with pytest.raises(UserError, match=r"terms\.perceptual.*emoji or clip:FOLDER"):
        load_recipe(HERE / "empty.yaml", method="lcm", sets=["terms.perceptual=inception:file.pt"])


def test_a_power_functions_average_weighs_the_past_by_a_power_of_its_age():
    """After n updates the i-th value has weight (i^(g+1) - (i-1)^(g+1)) / n^(g+1): with g = 1 and w_i = i,
    sum i (2 i - 1) / n^2."""
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net, 0.0, power=1.0)
    for i in range(1, 6):
        net.weight.data.fill_(i)
        ema.update()
    expected = sum(i * (2 * i - 1) for i in range(1, 6)) / 25
    assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-6)


def test_guidance_is_off_outside_its_interval():
    pipe = load_teacher("emoji")
    whole, part = PipelineTeacher(pipe), PipelineTeacher(pipe, guidance_interval=(0.0, 0.5))
    x, cond = (
        torch.randn(2, *whole.shape, generator=torch.Generator().manual_seed(0)),
        whole.encode(["cat", "dog"]),
    )
    t = torch.tensor([0.3, 0.7])
    guided, plain_one = whole.predict(x, t, cond, guidance=3.0).x0, whole.predict(x, t, cond).x0
    seen = part.predict(x, t, cond, guidance=3.0).x0
    torch.testing.assert_close(seen[0], guided[0])
    torch.testing.assert_close(seen[1], plain_one[1], atol=1e-4, rtol=1e-4)
    assert float((seen[1] - guided[1]).abs().max()) > 1e-2


def test_rescaled_guidance_is_the_teachers_where_it_is_asked_for(teacher_of):
    """At share 0 bit-equal to plain guidance; at 1 each output has the deviation of the prompted one."""
    plain = teacher_of("sd")
    full = PipelineTeacher(plain.pipe, guidance_rescale=1.0)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *plain.shape, generator=generator), torch.tensor([0.5, 0.9])
    cond = plain.encode(["a fish", "a heart"])
    deviation = [
        teacher.predict(x, t, cond, guidance=g).eps.flatten(1).std(1)
        for teacher, g in ((plain, 1.0), (full, 7.0), (plain, 7.0))
    ]
    torch.testing.assert_close(deviation[0], deviation[1], rtol=1e-4, atol=0)
    assert not torch.allclose(deviation[0], deviation[2], rtol=1e-3)
    off = PipelineTeacher(plain.pipe, guidance_rescale=0.0)
    assert torch.equal(off.predict(x, t, cond, guidance=7.0).x0, plain.predict(x, t, cond, guidance=7.0).x0)


def test_the_regression_of_a_flow_map_is_on_its_jump_to_data() -> None:
    """The exact map's jump from noise to t = 0 ends at the pair's own sample."""
    mean, deviation = 0.7, 0.4
    teacher = ToyTeacher(Gaussian(FlowPath(), mean, deviation), FlowPath())
    student = toy_student(GaussianFlowMap(mean, deviation), FlowPath(), "velocity")
    method = FlowMap(teacher, student, (1.0,), FlowMap.Options(guidance=1.0))
    batch = toy_batch(16, pairs=lambda z: mean + deviation * z)
    seen, wanted = ends(method.student, (1.0,), batch)
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=0)
