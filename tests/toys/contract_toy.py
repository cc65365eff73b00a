"""Any method between perceptrons, with a batch that has everything a method can need."""

from __future__ import annotations

from dataclasses import replace

import torch
from toy import Mixture, Perceptron, ToyTeacher, toy_batch, toy_student, weights_of

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.batch import Examples
from stepdistill.methods import find_method
from stepdistill.networks.roles import Copies

PATH = FlowPath()


def build(name, times=None):
    """A method between a perceptron that teaches and one that learns."""
    kind = find_method(name)
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = kind(Copies(teacher, student), times or kind.default_times, kind.Options())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # off the start, where a copy of the teacher may make a loss exactly zero
        for parameter in weights_of(method):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return method


def batch_for(method, count=8, step=0):
    """A batch with everything a method can need."""
    mixture = Mixture(PATH)
    images = mixture.sample(count, torch.Generator().manual_seed(7))
    batch = toy_batch(count, step, pairs=lambda z: 0.3 * z + 0.1, images=images)
    between = [t * batch.pairs.noise + (1 - t) * batch.pairs.x0 for t in method.times[1:]]
    states = torch.stack(between, 1) if between else None
    pairs = Examples(batch.pairs.x0, batch.pairs.cond, batch.pairs.noise, states)
    return replace(batch, pairs=pairs)
