"""For tests of methods of your own: whether one keeps the contract, and closed-form teachers whose answers are known.

``check_method("./my_method.py")`` tries a method between two small networks. ``toys`` has Gaussians and mixtures as
teachers and students, batches, and what a method's loss comes to.
"""

from __future__ import annotations

from stepdistill.testing.contract import BrokenContract, check_method
from stepdistill.testing.toys import (
    Affine,
    Gaussian,
    GaussianFlowMap,
    GaussianMap,
    Mixture,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

__all__ = [
    "Affine",
    "BrokenContract",
    "Gaussian",
    "GaussianFlowMap",
    "GaussianMap",
    "Mixture",
    "Perceptron",
    "ToyTeacher",
    "check_method",
    "loss_of",
    "toy_batch",
    "toy_student",
]
