"""A student that also says what its own samples look like: its twin, the same network told so in its second time.

A jump from t to s has t - s in [0, 1]. The twin is called with ``TWIN`` in the place of that length, which no jump has,
and is trained to denoise the student's samples: a fake score without a second network. At the start an embedded second
time changes nothing, so the twin starts as the teacher; late blocks (``second_time``) hear a time past 1,
which they have never met, and it first learns to be one. (TwinFlow, 2512.05150, tells it by times of the other sign,
which a timestep's pretrained embedding has never seen; Self-E, 2512.22374, by a prompt of its own.)
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT, predict_elsewhere
from stepdistill.diffusion.path import Prediction
from stepdistill.families.condition import Condition
from stepdistill.networks.student import Student

TWIN = -1.0
"""What stands in the place of t - s."""


def twin_prediction(student: Student, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
    """What the twin says about the student's samples, noised to x_t [B, ...] at t [B] of the straight path."""
    return predict_elsewhere(
        lambda x, own: student.predict(x, own, cond, own - TWIN), student.path, STRAIGHT, x_t, t
    )
