"""Terms that a recipe adds to any method, the two kinds of averages, and the guidance interval."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from torch import nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.losses.contract import Turn
from stepdistill.losses.objective import Objective, shown_name
from stepdistill.losses.regression import ends
from stepdistill.losses.reward_term import RewardTerm
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import GanTerm, PerceptualTerm, RegressionTerm
from stepdistill.methods import find_method
from stepdistill.methods.flow_map import FlowMap
from stepdistill.networks.averages import Ema
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.roles import Copies
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import method_names
from stepdistill.testing.contract import equipped
from stepdistill.testing.toys import (
    Gaussian,
    GaussianFlowMap,
    Mixture,
    Perceptron,
    ToyTeacher,
    clear,
    toy_batch,
    toy_student,
)
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.parallel import take_turn
from stepdistill.training.training_data import training_data

PATH = FlowPath()


def plain(name="reflow", times=(1.0,)):
    kind = find_method(name)
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    roles = Copies(teacher, toy_student(Perceptron(seed=1), PATH, "velocity"))
    return equipped(kind, roles, times, kind.Options())


def batch(step=0):
    images = Mixture(PATH).sample(8, torch.Generator().manual_seed(7))
    return toy_batch(8, step, pairs=lambda z: 0.3 * z + 0.1, images=images)


def direction(latents):
    """Unit features of toy latents."""
    return nn.functional.normalize(latents.flatten(1) + 2, dim=1)


def student_loss(objective, sample):
    """Value and logs of the student's turn at the step of the batch."""
    return objective.loss(Turn("student", sample.draws.step), sample)


def gan_beside(method, weight=1.0, lr_ratio=1.0):
    return Objective(method, [GanTerm(weight, method.teacher.denoiser, lr_ratio)])


def test_terms_add_to_the_methods_own_loss():
    method = plain()
    terms = [RegressionTerm(0.5, "l1"), PerceptualTerm(0.25, direction)]
    total, logs = student_loss(Objective(method, terms), batch())
    own = method.loss(Turn("student", 0), batch()).value
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
    method = plain()
    exact = method.student

    def land(z):
        with torch.no_grad():
            return exact.predict(z, torch.ones(len(z)), batch().cond).x0

    objective = Objective(method, [RegressionTerm(1.0, "l2"), PerceptualTerm(1.0, direction)])
    _, logs = student_loss(objective, toy_batch(8, pairs=land))
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
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(warm_times=(0.75, 0.25)))
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
    student_loss(Objective(method, [RegressionTerm(1.0, "l2")]), sample)
    x, t = asked[-1]
    line = t.view(-1, 1, 1, 1) * pairs.noise + (1 - t.view(-1, 1, 1, 1)) * pairs.x0
    torch.testing.assert_close(x, line)
    assert len(set(t.tolist())) > 2


@pytest.mark.parametrize("name", ["dmd", "reflow"])
def test_the_critics_turns_come_between_the_methods_own(name):
    """Without them the sequence of turns, rates and losses is that of the method alone: its clock is its own, and the
    random numbers are those of the run's step."""
    alone, objective = plain(name), gan_beside(plain(name), 1e-9, 3.0)
    turns = [objective.turn(step) for step in range(24)]
    assert turns[::2] == [Turn("term gan", step) for step in range(12)]
    assert turns[1::2] == [alone.turn(step) for step in range(12)]
    assert {objective.lr_ratio(turn) for turn in turns[::2]} == {3.0}
    for step in range(12):
        turn, sample = alone.turn(step), batch(2 * step + 1)
        loss, _ = objective.loss(turn, sample)
        own = alone.loss(turn, sample).value
        assert turn.network == "fake" or float(loss) == pytest.approx(float(own), rel=1e-4, abs=1e-6)


def test_what_the_perceptual_term_wants_holds_no_graph():
    """Also where the embedding network has weights that are not frozen: only the student's own features do."""
    loud, seen = nn.Parameter(torch.ones(())), []

    def embed(latents):
        seen.append(loud * direction(latents))
        return seen[-1]

    student_loss(Objective(plain(), [PerceptualTerm(1.0, embed)]), batch())
    assert [features.requires_grad for features in seen] == [False, True]


class Counted(find_method("reflow")):
    """Keeps the steps it is told, and logs that are not to be written to; its samples are judged from its step 5."""

    class Options(find_method("reflow").Options):
        @property
        def judged_from(self):
            return 5

    def setup(self):
        super().setup()
        self.steps = []

    def loss(self, turn, batch):
        return replace(super().loss(turn, batch), logs=MappingProxyType({}))

    def after_step(self, turn):
        self.steps.append(turn.step)

    def anew(self, turn):
        return frozenset({f"anew {turn.step}"})

    def phase(self, step):
        return "late" if step >= self.options.judged_from else "early"

    def sampler_at(self, step):
        return f"sampler {step}"

    def betas(self, turn):
        return (0.0, 0.9)


def counted():
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    return Counted(Copies(teacher, student), (1.0,), Counted.Options())


def test_what_a_method_says_of_its_own_steps_is_said_of_the_runs():
    for objective, first, later in ((Objective(counted()), 5, 7), (gan_beside(counted(), 0.1), 10, 6)):
        assert objective.judged_from == first
        assert [objective.phase(step) for step in (first - 1, first)] == ["early", "late"]
        asked = [objective.sampler_at(step) for step in (first, first + 2)]
        assert asked == ["sampler 5", f"sampler {later}"]


def test_a_method_is_told_its_own_steps_alone():
    with_gan, without = gan_beside(counted(), 0.1), Objective(counted(), [RegressionTerm(0.1, "l2")])
    for step in range(6):
        assert with_gan.anew(with_gan.turn(step)) == ({f"anew {step // 2}"} if step % 2 else set())
        assert without.anew(without.turn(step)) == {f"anew {step}"}
        assert with_gan.betas(with_gan.turn(step)) == ((0.0, 0.9) if step % 2 else None)
        assert without.betas(without.turn(step)) == (0.0, 0.9)
        for objective in (with_gan, without):
            objective.after_step(objective.turn(step))
    assert with_gan.method.steps == [0, 1, 2] and without.method.steps == list(range(6))
    assert set(with_gan.trained) == {"student", "term gan"} and set(without.trained) == {"student"}
    assert set(student_loss(with_gan, batch(1))[1]) == {"term gan"}
    assert set(student_loss(without, batch(1))[1]) == {"term regression"}


def test_networks_are_called_what_people_call_them():
    names = ("term reward", "term gan", "fake", "expert-2", "student")
    assert [shown_name(name) for name in names] == [
        *("latent reward", "gan discriminator", "fake score", "expert 2", "student")
    ]


def test_a_methods_own_discriminator_and_the_terms_both_train():
    """PCM calls its discriminator what it likes: four turns move its own, the term's and the student, each alone."""
    kind = find_method("pcm")
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    objective = gan_beside(kind(Copies(teacher, student), (1.0,), kind.Options(adversarial_weight=0.1)), 0.1)
    assert [objective.turn(step).network for step in range(4)] == [
        *("term gan", "discriminator", "term gan", "student")
    ]
    parameters = {name: objective.weights(name) for name in objective.trained}
    for step in range(4):
        turn = objective.turn(step)
        take_turn(parameters, turn.network)
        clear(objective.method)
        objective.zero_grad(set_to_none=True)
        objective.loss(turn, batch(step))[0].backward()
        reached = {name for name, own in parameters.items() if any(p.grad is not None for p in own)}
        assert reached == {turn.network}
        assert any(bool(p.grad.any()) for p in parameters[turn.network])


def test_a_critic_called_like_a_network_of_the_method_is_refused():
    class Clash(find_method("pcm")):
        def trained(self):
            return {**super().trained(), "term gan": super().trained()["student"]}

    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    method = Clash(
        Copies(teacher, toy_student(Perceptron(seed=1), PATH, "velocity")), (1.0,), Clash.Options()
    )
    with pytest.raises(ValueError, match="'term gan'"):
        gan_beside(method)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("dmd", (1.0,)),
        ("phased_dmd", (1.0, 0.5)),
        ("flow_map", (1.0, 0.5)),
        ("lcm", (1.0,)),
        ("reflow", (1.0, 0.5)),
    ],
)
def test_terms_read_the_students_samples_and_the_critic_the_same_ones(name, times):
    """The samples are the method's own where its loss makes them, and a term costs no second rollout there."""
    kind = find_method(name)
    options = kind.Options(**({"phases": 1} if name == "phased_dmd" else {}))
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    method = kind(Copies(teacher, toy_student(Perceptron(seed=1), PATH, "velocity")), times, options)
    objective, sample = gan_beside(method), batch_with_states(batch(1), times)
    turn = next(turn for step in range(1, 40) if (turn := objective.turn(step)).network == "student")
    found = method.loss(turn, sample)
    made = method.sample(sample)
    assert made.requires_grad
    assert (found.sample is not None) == (name in ("dmd", "phased_dmd"))
    if found.sample is not None:
        assert torch.equal(found.sample, made) and found.sample.requires_grad
    calls = []
    method.student.net.register_forward_hook(lambda *_: calls.append(1))
    method.loss(turn, sample)
    alone = len(calls)
    _, logs = objective.loss(turn, sample)
    more = 0 if found.sample is not None else len(times)
    assert len(calls) == 2 * alone + more
    assert torch.equal(logs["term gan"], objective.terms["gan"].gan.for_generator(made, sample))
    critics = objective.loss(Turn("term gan", 0), sample)[0]
    wanted = objective.terms["gan"].gan.for_discriminator(made.detach(), sample.images, sample)
    assert torch.equal(critics, wanted)
    critics.backward()
    assert all(p.grad is None for p in method.student.net.parameters())
    assert all(p.grad is not None for p in objective.terms["gan"].parameters())


@pytest.mark.parametrize(("name", "times"), [("flow_map", (1.0, 0.5)), ("lcm", (1.0,)), ("tcd", (1.0, 0.5))])
def test_samples_are_those_that_are_drawn_and_their_gradient_that_of_the_last_call(name, times):
    method = plain(name, times)
    sample, sampler = batch(1), method.sampler()
    made = method.sample(sample)
    with torch.no_grad():
        start = sampler.walk(method.student, sample.noise, sample.cond, sample.fresh, len(times) - 1)
    t = torch.full((8,), times[-1])
    end = (torch.zeros(8),) if method.student.two_times else ()
    last = method.student.predict(start, t, sample.cond, *end).x0
    assert torch.equal(made, last)
    parameters = list(method.student.net.parameters())
    for one, two in zip(
        torch.autograd.grad(made.sum(), parameters), torch.autograd.grad(last.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_a_reward_is_climbed_and_told_which_prompt_each_sample_is_of():
    """Less the weighted mean reward is added; a step against its gradient raises the reward."""
    told = []

    def reward(x0, prompt):
        told.append(prompt)
        return x0.flatten(1).mean(1) * (1 + prompt)

    method, sample = plain("dmd"), batch(1)
    objective = Objective(method, [RewardTerm(0.5, Rewards(lambda x0: x0, (reward,)))])
    turn = next(turn for step in range(40) if (turn := objective.turn(step)).network == "student")
    loss, logs = objective.loss(turn, sample)
    before = reward(method.sample(sample), sample.prompt).mean()
    assert float(logs["term reward"]) == pytest.approx(-float(before), rel=1e-6)
    own = method.loss(turn, sample).value
    assert float(loss) == pytest.approx(float(own - 0.5 * before), rel=1e-5)
    assert all(torch.equal(prompt, sample.prompt) for prompt in told)
    parameters = list(method.student.net.parameters())
    with torch.no_grad():
        for value, gradient in zip(
            parameters, torch.autograd.grad(logs["term reward"], parameters), strict=True
        ):
            value -= 0.01 * gradient
    assert float(reward(method.sample(sample), sample.prompt).mean()) > float(before)


def test_one_expert_for_all_calls_takes_a_gan():
    kind = find_method("phased_dmd")
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(phases=1))
    assert method.trained()["student"].span == (0, 2)
    assert "term gan" in gan_beside(method, 0.5).trained


def batch_with_states(sample, times):
    """The same with the states of straight trajectories."""
    pairs = sample.pairs
    between = [t * pairs.noise + (1 - t) * pairs.x0 for t in times[1:]]
    return replace(sample, pairs=replace(pairs, states=torch.stack(between, 1) if between else None))


@pytest.mark.parametrize("name", method_names())
def test_any_method_takes_them(name):
    kind = find_method(name)
    times = (1.0, 0.5) if len(kind.default_times) > 1 else (1.0,)
    gan = name != "phased_dmd"  # whose experts draw no clean sample, but for the last
    method = plain(name, times)
    terms: list[Any] = [
        RegressionTerm(1.0, "l2"),
        *([GanTerm(1.0, method.teacher.denoiser, 1.0)] if gan else []),
    ]
    objective, sample = Objective(method, terms), batch_with_states(batch(1), times)
    turn = next(
        turn
        for step in range(1, 400)
        if not objective.trained[(turn := objective.turn(step)).network].follows
    )
    loss, logs = objective.loss(turn, sample)
    assert {"term regression"} | ({"term gan"} if gan else set()) <= set(logs) and bool(torch.isfinite(loss))
    for name, one in objective.trained.items():
        if one.follows:  # no term is for what follows the student
            found, logs = objective.loss(Turn(name, turn.step), sample)
            assert not any(key.startswith("term") for key in logs) and bool(torch.isfinite(found))


def test_of_several_experts_the_one_that_is_trained_has_the_whole_term():
    """Phased DMD: in an expert's turn the regression reads that expert's calls alone, and all of its gradient is that
    expert's. A GAN, which would have none in an early expert, is refused."""
    times = (1.0, 0.75, 0.5, 0.25)
    kind = find_method("phased_dmd")
    options = kind.Options(phase_updates=1, fake_updates=1)

    def experts():
        teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
        return kind(Copies(teacher, toy_student(Perceptron(seed=1), PATH, "velocity")), times, options)

    method = experts()
    objective, sample = Objective(method, [RegressionTerm(1.0, "l2")]), batch_with_states(batch(), times)
    assert objective.averaged == "student"
    nets = dict(zip(("expert-1", "student"), (one.net for one in method.student.experts), strict=True))
    for whose, own in (("expert-1", (0, 2)), ("student", (2, 4))):
        turn = next(turn for step in range(9) if (turn := method.turn(step)).network == whose)
        _, logs = objective.loss(turn, sample)
        clear(method)
        logs["term regression"].backward()
        assert {name for name, net in nets.items() if any(p.grad is not None for p in net.parameters())} == {
            whose
        }
        assert method.trained()[whose].span == own
    with pytest.raises(UserError, match=r"terms\.gan_weight is 0\.5, but expert-1 draws no clean sample"):
        gan_beside(experts(), 0.5)
    with pytest.raises(UserError, match=r"terms\.reward_weight is 0\.5, but expert-1 draws no clean sample"):
        Objective(experts(), [RewardTerm(0.5, Rewards(lambda x0: x0, ()))])


@pytest.mark.slow
def test_a_run_with_every_term_on_the_embedded_teacher(tmp_path):
    sets = [
        f"data.prompts={HERE / 'prompts.txt'}", "train.updates=4", "train.batch=4", "train.preview_every=0",
        "options.pairs=8", "options.pair_steps=4", "options.guidance=2.0", "student.times=[1.0, 0.5]", "evaluate=false",
        "terms.regression_weight=0.1", "terms.perceptual_weight=0.1", "terms.gan_weight=0.01",
        "terms.reward_weight=0.01", "train.average_power=6.94",
    ]  # fmt: skip
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(load_recipe(HERE / "empty.yaml", method="lcm", sets=sets)), accelerator, None)
    assert job.needs >= {"pairs", "states", "images"}
    before = {name: value.clone() for name, value in job.teacher.denoiser.net.state_dict().items()}
    trained = train(job.objective, training_data(job, tmp_path), job.recipe, tmp_path, accelerator)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["network"] for row in rows] == ["gan discriminator", "student"] * 2
    assert {"term regression", "term perceptual", "term gan", "term reward"} <= set(rows[1])
    assert 0 < rows[1]["term perceptual"] < 4 and -1 < rows[1]["term reward"] < 1
    after = job.teacher.denoiser.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert trained.ema is not None and trained.ema.updates == 2


def test_only_networks_with_a_graph_can_be_perceptual():
    with pytest.raises(UserError, match=r"terms\.perceptual.*emoji or clip:FOLDER"):
        load_recipe(HERE / "empty.yaml", method="lcm", sets=["terms.perceptual=inception:file.pt"])
    with pytest.raises(UserError, match=r"terms\.reward.*not known: give clip:emoji.*clip:FOLDER"):
        load_recipe(HERE / "empty.yaml", method="lcm", sets=["terms.reward=dinov2:folder"])


def test_a_power_functions_average_weighs_the_past_by_a_power_of_its_age():
    """After n updates the i-th value has weight (i^(g+1) - (i-1)^(g+1)) / n^(g+1): with g = 1 and w_i = i,
    sum i (2 i - 1) / n^2."""
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(dict(net.named_parameters()), 0.0, power=1.0)
    for i in range(1, 6):
        net.weight.data.fill_(i)
        ema.update()
    expected = sum(i * (2 * i - 1) for i in range(1, 6)) / 25
    assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-6)


def test_guidance_is_off_outside_its_interval():
    pipe = load_teacher("emoji")
    whole, part = PipelineTeacher(pipe), PipelineTeacher(pipe, guidance_interval=(0.0, 0.5))
    x, cond = (
        torch.randn(2, *whole.codec.shape, generator=torch.Generator().manual_seed(0)),
        whole.codec.encode(["cat", "dog"]),
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
    x, t = torch.randn(2, *plain.codec.shape, generator=generator), torch.tensor([0.5, 0.9])
    cond = plain.codec.encode(["a fish", "a heart"])
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
    method = FlowMap(Copies(teacher, student), (1.0,), FlowMap.Options(guidance=1.0))
    batch = toy_batch(16, pairs=lambda z: mean + deviation * z)
    seen, wanted = ends(method.student, (1.0,), batch)
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=0)
