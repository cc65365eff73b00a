"""How the scores against a teacher's own pictures are to be read, in sentences for reports and pages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepdistill.evaluation.scores import AGAINST
from stepdistill.features.network import FeatureNetwork


def remarks(
    network: FeatureNetwork, features: Tensor, *, steps: int, embedded: bool, videos: bool, learnt: bool
) -> list[str]:
    """The sentences.

    Args:
        network: that sees the pictures.
        features: [N, D] of the teacher's pictures at full steps, in the order of their prompts.
        steps: the teacher's full steps.
        embedded: whether the network is the embedded one.
        videos: whether frames are compared, and motion measured.
        learnt: whether the student learnt from the prompts that are measured.
    """
    count = len(features)
    apart = (1 - F.cosine_similarity(features, features.roll(1, 0))).mean()
    found = [
        f"Measured against {AGAINST} ({steps} steps), not against real images: 0 is what the teacher draws.",
        "Gap closed: 1 - KID of the student / KID of the teacher with one step. KID is 0 on average for every student "
        "of the teacher's distribution, also where it draws other pictures.",
        f"FD of so few pictures ({count}, in {network.dimension} features) is too large by what depends on their "
        "number, and more so where a student draws other pictures than its teacher: compare it at equal n, beside the "
        "teacher's at few steps, and within a kind of methods; else read KID.",
        "Paired distance: 1 - cosine of the features of the student's and the teacher's picture of one prompt and "
        "noise; paired RMSE: of their pixels in [0, 1]. For scale: the teacher's pictures of different prompts "
        f"are {apart:.3g} apart. A method that matches distributions (DMD, SiD) may draw another picture of a "
        "prompt.",
    ]
    if embedded:
        found.append(
            "The embedded network sees pictures at 32 x 32 pixels, layout and colours but no detail: set "
            "against_teacher.features=clip:FOLDER, dinov2:FOLDER or inception for more."
        )
    if videos:
        found.append(
            "Of videos the first, the middle and the last frame are compared, side by side. Motion: how far one is "
            "from the next, RMS of pixels in [0, 1]; neither more nor less is better, near the teacher's is."
        )
    if learnt:
        found.append(
            "The student learnt from the prompts that are measured: they are too few to hold some out."
        )
    return found
