"""LADD and ADD: where the student is called, how the heads judge it, and what the teacher says beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Examples
from stepdistill.losses.contract import Turn
from stepdistill.methods.ladd import LADD
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Affine, Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

PATH = FlowPath()


def method_of(student=None, teacher=None, times=(1.0, 0.75, 0.5, 0.25), path=PATH, **options):
    own = ToyTeacher(Perceptron(seed=0), path)
    roles = Copies(own, toy_student(student or Perceptron(seed=1), path))
    method = LADD(roles, times, LADD.Options(**options))
    own.denoiser.net = teacher or own.denoiser.net  # heads want features, which a closed form has not
    return method


def batch_of(count=64, **more):
    return toy_batch(count, pairs=lambda z: 0.7 + 0.6 * z, **more)


class Zero(nn.Module):
    """Logits of zero for three heads, with a graph."""

    def forward(self, maps):
        return torch.stack([0 * own.flatten(1).sum(1) for own in maps * 3], 1)


@pytest.mark.parametrize(("hinge", "student", "critic"), [(True, 0.0, 6.0), (False, 2.07944, 4.15888)])
def test_heads_that_say_nothing_cost_two_each_by_the_hinge_and_ln_2_by_softplus(hinge, student, critic):
    method, batch = method_of(hinge=hinge), batch_of()
    method.gan.head = Zero()
    assert float(loss_of(method, "student", batch)[0].detach()) == pytest.approx(student, abs=1e-4)
    assert float(loss_of(method, "discriminator", batch)[0].detach()) == pytest.approx(critic, abs=1e-4)


def test_one_kind_of_latents_has_no_gap_in_the_mean():
    """The student gives back what it was made of: by one law of noise the logits of both have one mean."""
    method, batch = method_of(), batch_of(4096)
    x, cond = batch.pairs.x0, Condition()
    with torch.no_grad():
        logits = [method.gan.logits(*method.gan.noised(x, batch, own), cond) for own in ("gan", "gan real")]
    gap, spread = float((logits[0] - logits[1]).mean()), float((logits[0] - logits[1]).std()) / 64
    assert spread > 0 and abs(gap) < 4 * spread  # draws of their own, and one law


@pytest.mark.parametrize(("mean", "deviation"), [(1.0, 1.0), (-0.5, 0.3)])
def test_the_heads_look_at_logit_normal_times(mean, deviation):
    method, batch = method_of(noise_mean=mean, noise_deviation=deviation), batch_of(4096)
    for stream in ("gan", "gan real"):
        logit = torch.logit(method.gan.noised(batch.noise, batch, stream)[1].double())
        assert float(logit.mean()) == pytest.approx(mean, abs=0.06)
        assert float(logit.std()) == pytest.approx(deviation, rel=0.05)


def test_the_student_is_called_at_its_times_by_their_shares_on_noised_latents():
    method, batch = method_of(first_share=0.4), batch_of(4096)
    t = method.times_of(batch)
    shares = [float((t == time).float().mean()) for time in method.times]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)
    assert set(method_of(times=(1.0,), first_share=0.1).times_of(batch).tolist()) == {1.0}
    two = method_of(times=(1.0, 0.5), first_share=0.1).times_of(batch)
    assert float((two == 0.5).float().mean()) == pytest.approx(0.9, abs=0.03)


def test_at_pure_noise_nothing_of_the_latents_is_seen():
    """An affine student shows what it was given: eps alone at t = 1, the noised latents elsewhere."""
    path = TrigPath()
    method, batch = method_of(Affine(0.0, 1.0), path=path), batch_of()
    real = Examples(batch.pairs.x0, Condition())
    own = batch.__class__(batch.draws, batch.shape, Condition(), batch.prompt, images=real)
    given, t = method.generate(own), method.times_of(own)
    eps = batch.draws.normal("eps", (2, 1, 1))
    noise = t == 1
    assert bool(noise.any()) and not bool(noise.all())
    assert torch.equal(given[noise], eps[noise])
    torch.testing.assert_close(given[~noise], path.noised(real.x0, eps, t)[~noise])


def test_adds_distillation_is_score_distillation_with_a_weight():
    """Its gradient in x is 2 alpha (x - x0_T) = 2 sigma (eps_T - eps), over the number of elements; the teacher has
    none, and no gradient goes through what it sees."""
    path = TrigPath()
    method = method_of(teacher=Gaussian(path, 0.3, 0.8), path=path, distillation_weight=2.5)
    batch = batch_of()
    x = batch.noise.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(method.distillation(x, batch), x)
    t, eps = batch.draws.uniform("distillation t"), batch.draws.normal("distillation eps", (2, 1, 1))
    said = method.teacher.predict(path.noised(x.detach(), eps, t), t, Condition())
    sigma = path.alpha_sigma(t)[1]
    torch.testing.assert_close(
        slope, 2 * per_sample(sigma, x) * (said.eps - eps) / x.numel(), rtol=1e-4, atol=1e-6
    )


def test_the_weight_of_the_distillation_is_as_stated_and_guidance_that_of_the_teacher():
    batch = batch_of()
    plain, both = (loss_of(method_of(distillation_weight=w), "student", batch) for w in (0.0, 2.5))
    assert "distillation" not in plain[1]
    torch.testing.assert_close(both[0], plain[0] + 2.5 * both[1]["distillation"])
    path = PATH
    method = method_of(teacher=Gaussian(path, 0.3, 0.8), guidance=3.0, distillation_weight=1.0)
    method.teacher.unguided = ToyTeacher(Gaussian(path, 0.0, 0.8), path).denoiser
    guided = method.distillation(batch.noise, batch)
    method.options = LADD.Options(guidance=1.0)
    assert not torch.allclose(guided, method.distillation(batch.noise, batch))


def test_real_latents_bring_their_own_conditions(monkeypatch):
    """Pairs have prompts of their own: what the student makes of them, and what they are, is judged by those."""
    own = Condition({"label": torch.ones(64)})
    batch = batch_of(images=torch.zeros(64, 2, 1, 1))
    batch = batch.__class__(
        batch.draws, batch.shape, Condition(), batch.prompt, pairs=Examples(batch.pairs.x0, own)
    )
    method, seen = method_of(), []
    plain = method.gan.logits
    monkeypatch.setattr(method.gan, "logits", lambda x, t, cond: (seen.append(cond), plain(x, t, cond))[1])
    found = method.loss(Turn("student", 4), batch)
    method.loss(Turn("discriminator", 0), batch)
    assert len(seen) == 3 and all(cond is own for cond in seen)
    assert found.sample is None  # terms draw samples of the batch's own noise and conditions
    assert method.sample(batch).shape == batch.noise.shape


def test_sources_and_turns():
    assert method_of().options.needs == {"noise", "prompts", "pairs"} and not LADD.starts_below
    assert method_of(source="images").options.needs == {"noise", "prompts", "images"}
    assert method_of(warm_start=2).options.needs == {"noise", "prompts", "pairs", "states"}
    assert [method_of().turn(step).network[0] for step in range(10)] == list("dddds") * 2
    images = batch_of(images=torch.full((64, 2, 1, 1), 9.0))
    of_images, of_pairs = (
        loss_of(method_of(source=own), "discriminator", images)[0] for own in ("images", "pairs")
    )
    assert not torch.allclose(of_images, of_pairs)


def test_noise_between_steps_is_fresh_but_on_a_flow_path_or_as_the_option_says():
    for path, renoise, fresh in ((PATH, None, False), (TrigPath(), None, True), (PATH, True, True)):
        assert method_of(path=path, renoise=renoise).sampler().renoise is fresh
    assert method_of(path=TrigPath(), renoise=False).sampler().renoise is False
