"""A student measured against its teacher's own pictures: what can be measured of every teacher, without real images.

Student and teacher draw the same prompts from the same noises. The Frechet and the kernel distance compare the two sets
of pictures, which say nothing of real images: a student that draws what its teacher draws is at 0. The paired distances
compare picture with picture, and need no large number of them; a student of a method that matches distributions (DMD,
SiD and others) may well draw another picture of the same prompt. The Frechet distance of few other pictures is far from
0 where both have one distribution, the kernel distance is 0 on average: the gap is closed by the kernel distance.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.conflicts import conflicts
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.measure import measure
from stepdistill.evaluation.paired import ERRORS, PAIRED, gaps_closed, paired
from stepdistill.evaluation.reference_files import Reference
from stepdistill.evaluation.rows import HeldRows, RowTable
from stepdistill.evaluation.scores import AGAINST, REPORTED
from stepdistill.evaluation.suite import Suite
from stepdistill.evaluation.suite_identity import without_folder
from stepdistill.evaluation.teacher_pictures import TeacherPictures, batches
from stepdistill.evaluation.teacher_remarks import remarks
from stepdistill.families.kinds import LabelFamily
from stepdistill.families.size import Size
from stepdistill.features.at_hand import images_at_hand, texts_at_hand
from stepdistill.features.load import features_sha256
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.frechet import Moments
from stepdistill.metrics.motion import changes, frames_of_strips
from stepdistill.metrics.standard_errors import of_mean
from stepdistill.networks.codec import Encoded
from stepdistill.networks.pictures import draw_as_pipeline, shown_frames, to_uint8
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.given import identity
from stepdistill.recipes.sections import AgainstTeacherOptions
from stepdistill.system.log import bar, say
from stepdistill.system.processes import ALONE, Processes

VERSION = 2
"""1 had the gap of the Frechet distance, and another error of it."""
LABEL = f"against-teacher@{VERSION}"
FIRST_SEED = 2_000_000
MOTION = ("motion", "motion_se")
Pictures = Iterable[tuple[list[int], Tensor]]
"""Numbers of pictures, and the pictures uint8 [B, 3, H, W]."""


class AgainstTeacher:
    """The protocol of one run: which pictures, in which networks.

    Args:
        teacher: the run's.
        guidance: the scale that the student learnt.
        counts: the student's step counts.
        prompts: what is drawn, spread evenly over them and from the start again where they are fewer than the pictures.
        held_out: whether the student learnt from none of them.
        saw: the feature networks that the student's loss looked through, and the keys that say so.
        options: how many pictures, how many steps, which networks.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        guidance: float,
        counts: Sequence[int],
        prompts: Sequence[str],
        *,
        held_out: bool,
        saw: Mapping[str, str] = MappingProxyType({}),
        options: AgainstTeacherOptions,
    ) -> None:
        self.teacher, self.guidance, self.held_out = teacher, guidance, held_out
        self.saw = dict(saw)
        self.counts, self.full = sorted(counts), options.steps
        self.count = options.pictures or default_count(teacher.size)
        different = min(self.count, len(prompts))
        self.prompts = [prompts[i % different * len(prompts) // different] for i in range(self.count)]
        self.different = len(set(self.prompts))
        self.seeds = range(FIRST_SEED, FIRST_SEED + self.count)
        self.labels = isinstance(teacher.family, LabelFamily)
        self.features = images_at_hand() if options.features == "auto" else options.features
        texts = None if self.labels or options.texts == "none" else options.texts
        if texts == "auto":
            texts = self.features if self.features.startswith("clip:") else texts_at_hand()
        self.texts = texts
        weights = teacher.fingerprint()

        def pictures(steps: int, scale: float) -> TeacherPictures:
            return TeacherPictures(teacher, weights, self.prompts, self.seeds, steps, scale)

        self.reference = pictures(self.full, guidance)
        self.few = {steps: pictures(steps, guidance) for steps in sorted({1, *counts} - {self.full})}
        # The teacher at one step is taken at its better guidance, so that the gap is not flattered.
        self.plain = pictures(1, 1.0) if guidance != 1 and self.full > 1 else None

    @property
    def _sets(self) -> list[TeacherPictures]:
        return [self.reference, *self.few.values(), *([self.plain] if self.plain else [])]

    def prepare(self, processes: Processes = ALONE) -> None:
        """Draws the teacher's pictures that are not in the cache, and says before what that takes.

        Args:
            processes: who share the work; all of them must call this.
        """
        missing = {each: len(each.pictures.missing()) for each in self._sets}
        if processes.main:
            for line in self.plan(missing):
                say(line)
        shown = processes.main and any(missing.values())
        own = -(-sum(missing.values()) // processes.count)
        with bar(own, "teacher's pictures", unit="image", shown=shown) as moving:
            for each in self._sets:
                each.draw(moving.update, processes)

    def plan(self, missing: Mapping[TeacherPictures, int]) -> list[str]:
        """What is measured, and what it takes, in sentences.

        Args:
            missing: how many pictures of each set are to be drawn.
        """
        size = self.teacher.size
        kind = (
            "held out of training"
            if self.held_out
            else "of training, from other seeds (too few to hold some out)"
        )
        lines = [
            f"evaluate: the student against {self.count} pictures of the teacher ({self.full} steps, guidance "
            f"{self.guidance:g}) of {self.different} prompts {kind}"
        ]
        samples = sum(count * each.samples for each, count in missing.items())
        if samples:
            counts = ", ".join(
                f"{count} in {each.steps}{' (unguided)' if each is self.plain else ''}"
                for each, count in missing.items()
                if count
            )
            lines.append(
                f"evaluate: the teacher draws first {counts} steps at {size.height} x {size.width} pixels, {samples:,} "
                f"network samples in all, once: they are kept in {self.reference.pictures.folder.parent}"
            )
        return lines

    def scores(self, draw: Callable[[int], Pictures]) -> dict[str, Any]:
        """The student's scores beside the teacher's, as report.json has them.

        Args:
            draw: the student's pictures in so many steps, such as :meth:`drawn`.

        Raises:
            UserError: a feature network is missing, or what was drawn has NaN or Inf.
        """
        extraction = Extraction(self._suite(), self.teacher.device)
        network = extraction.network
        assert network is not None  # the suite's one network; where it is missing Extraction raises
        full = self._rows(extraction, self.reference.read())
        reference = _reference_of(full, self.reference.sha256)
        found: dict[str, dict[int, dict[str, float | None]]] = {"teacher": {}, "student": {}}

        def compared(drawn: Pictures) -> dict[str, float | None]:
            rows = self._rows(extraction, drawn)
            values = measure(rows, extraction.suite, network, reference, self.teacher.device).values()
            return {**values, **paired(rows, full, network), **self._motion(rows)}

        for steps, each in self.few.items():
            found["teacher"][steps] = compared(each.read())
        if self.plain is not None:
            plain = compared(self.plain.read())
            found["teacher"][1] = min(found["teacher"][1], plain, key=_kernel_distance)
        clip = of_mean(full.whole("clip_score")) if "clip_score" in full else None
        found["teacher"][self.full] = {**dict.fromkeys(PAIRED, 0.0), **self._motion(full)}
        if clip is not None:
            found["teacher"][self.full] |= {"clip_score": clip.value, "clip_score_se": clip.standard_error}
        for steps in self.counts:
            began = time.perf_counter()
            drawn = list(draw(steps))
            seconds = (time.perf_counter() - began) / self.count
            found["student"][steps] = {**compared(drawn), "seconds_per_image": seconds}
        try:
            gaps = gaps_closed(found["student"], found["teacher"][1])
        except UserError as error:
            gaps = {}
            say(f"gap closed is left out: {error}")
        clip_network = extraction.network_of("clip_score")
        return {
            "suite": LABEL,
            "n": self.count,
            "against": AGAINST,
            "metrics": {
                "fd": network.fd_name,
                "clip_score": clip_network.clip_name if clip_network else None,
            },
            "better": {"paired_distance": "lower", "paired_rmse": "lower"}
            | ({"motion": "neither"} if "motion" in found["teacher"][self.full] else {}),
            "loss_saw": self.saw,
            "conflicts": conflicts(
                {
                    **extraction.suite.asked(self.features),
                    "kid": self.features,
                    "paired_distance": self.features,
                },
                self.saw,
            ),
            "protocol": self._protocol(network),
            "remarks": remarks(
                network,
                full.whole("features"),
                steps=self.full,
                embedded=self.features == "emoji",
                videos=self.teacher.size.frames > 1,
                learnt=not (self.held_out or self.labels),
            ),
            "guidance": self.guidance,
            "teacher": _by_metric(found["teacher"]),
            "student": _by_metric(found["student"]),
            "gap_closed": gaps,
        }

    def _motion(self, rows: RowTable) -> dict[str, float | None]:
        """How much videos move between the frames that are kept of them; nothing of pictures."""
        if len(shown := shown_frames(self.teacher.size.frames)) < 2:
            return {}
        moving = of_mean(changes(frames_of_strips(rows.whole("pixels"), len(shown))))
        return {"motion": moving.value, "motion_se": moving.standard_error}

    def _suite(self) -> Suite:
        """The metrics; its prompts and its reference are the run's."""
        texts = self.texts
        return Suite(
            name="against-teacher", version=VERSION, n=self.count, prompts="emoji" if texts else None, resolution=0,
            features=self.features, kid=False, neighbours=0, clip_score=texts is not None,
            clip_network=None if texts == self.features else texts, reference="", teacher_steps=self.full,
        )  # fmt: skip

    def drawn(self, student: Student, sampler: Sampler) -> Pictures:
        """The student's pictures, as its trainer draws them.

        Args:
            student: with the weights that were exported.
            sampler: how it draws.
        """
        codec = Encoded.of(self.teacher.codec, self.prompts)
        for rows in batches(range(self.count), self.teacher):
            prompts, seeds = [self.prompts[i] for i in rows], [self.seeds[i] for i in rows]
            drawn = draw_as_pipeline(student, sampler, codec, prompts, seeds)
            if not drawn.isfinite().all():
                raise UserError(f"evaluate: the student drew NaN or Inf for one of {prompts} (seeds {seeds})")
            yield rows, to_uint8(drawn)

    def _rows(self, extraction: Extraction, drawn: Pictures) -> HeldRows:
        """Rows of pictures in their order, and the pictures' own pixels."""
        found: dict[str, list[Tensor]] = {}
        for numbers, pixels in drawn:
            prompts = [self.prompts[i] for i in numbers] if self.texts else None
            rows = {**extraction(pixels, prompts), "pixels": pixels}
            for name, value in rows.items():
                found.setdefault(name, []).append(value.cpu())
        return HeldRows({name: torch.cat(some) for name, some in found.items()})

    def _protocol(self, network: FeatureNetwork) -> dict[str, str]:
        """All that the numbers depend on: two runs compare only where it is equal."""
        size = self.teacher.size
        told = {
            "against": AGAINST,
            "prompts": f"{self.different}, {'held out of training' if self.held_out else 'of training'}",
            "seeds": f"picture i: torch.Generator('cpu').manual_seed({FIRST_SEED} + i)",
            "teacher_steps": str(self.full),
            "guidance": f"{self.guidance:g}",
            "size": f"{size.height} x {size.width}" + f" x {size.frames}" * (size.frames > 1),
            "features": without_folder(network.name),
            "features_sha256": network.sha256,
            "resize": network.resize,
            "precision": network.precision,
            "reference_sha256": self.reference.sha256,
            "standard_errors": ERRORS,
        }
        if self.texts is not None:
            told |= {"clip_network": without_folder(self.texts), "clip_sha256": features_sha256(self.texts)}
        own = json.dumps([LABEL, self.count, [*map(identity, self.prompts)], told], sort_keys=True)
        return {**told, "suite_sha256": hashlib.sha256(own.encode()).hexdigest()}


def default_count(size: Size) -> int:
    """Pictures where the recipe gives no number: 64, or 256 of 256 x 256 pixels or fewer, or 16 videos."""
    return 16 if size.frames > 1 else 256 if size.height * size.width <= 256 * 256 else 64


def _reference_of(rows: RowTable, sha256: str) -> Reference:
    features = rows.whole("features")
    return Reference(Moments.of(features), features, {}, sha256)


def _kernel_distance(scores: Mapping[str, float | None]) -> float:
    distance = scores["kid"]
    assert distance is not None  # paired() has always one
    return distance


def _by_metric(scores: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each score by step count; one that no step count has is left out, but for FD and CLIP score."""
    table = {
        name: {str(steps): found.get(name) for steps, found in sorted(scores.items())}
        for name in (*REPORTED, *PAIRED, *MOTION)
    }
    kept = ("fd", "clip_score")
    return {
        name: row for name, row in table.items() if name in kept or any(v is not None for v in row.values())
    }
