"""The parts of one evaluation: who draws which shards, and what all of them say together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.evaluation.draw_shards import draw_shards
from stepdistill.evaluation.drawing import Drawing, cut_prompts
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.folder import steps_folder
from stepdistill.evaluation.gallery import FILE, make_gallery, side_of
from stepdistill.evaluation.measure import measure
from stepdistill.evaluation.reference_files import Reference
from stepdistill.evaluation.rows import Rows
from stepdistill.evaluation.scores import StepScores
from stepdistill.evaluation.shards import MANIFEST, Shards, claim
from stepdistill.evaluation.suite import Suite
from stepdistill.evaluation.suite_identity import OWN_METRIC, protocol_of
from stepdistill.metrics.diversity import Diversity, pairwise_diversity
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.loading import filters_of, load_pipeline
from stepdistill.system.files import written_whole
from stepdistill.system.log import bar
from stepdistill.system.parsing import parse_json
from stepdistill.system.processes import Processes

SCORES = "scores.json"


@dataclass(frozen=True)
class Part:
    """The images of one step count.

    Attributes:
        steps: the step count.
        images: the suite's n.
        samples: those of diversity; None where the suite asks none.
        own_images, own_samples: the shards that this process draws.
        at_once: the processes that have images to draw.
    """

    steps: int
    images: Shards
    samples: Shards | None
    own_images: Sequence[int]
    own_samples: Sequence[int]
    at_once: int

    def save(self, scores: StepScores) -> None:
        """Tell the other processes."""
        with written_whole(self.images.folder / SCORES) as temporary:
            temporary.write_text(json.dumps(asdict(scores)), "utf-8")

    def wait(self, processes: Processes, folder: Path) -> StepScores:
        """The scores, as soon as the main process has measured them."""
        file = self.images.folder / SCORES
        processes.wait_until(file.exists, folder)
        return StepScores(**parse_json(file.read_text("utf-8")))


class Work:
    """A pipeline and a suite's networks, loaded and checked against each other.

    Args:
        pipeline, suite, device, guidance, trailing, eta: see :func:`stepdistill.evaluation.evaluate.evaluate`.
        own: further arguments of a student's own call.

    Raises:
        UserError: they do not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        suite: Suite,
        device: torch.device | str | None,
        guidance: float | None,
        trailing: bool,
        eta: float | None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        self.suite, self.prompts = suite, suite.prompt_list()
        self._pipeline, self._trailing, self._eta = pipeline, trailing, eta
        self.pipe, self.label = load_pipeline(pipeline, device)
        self.drawing = Drawing(self.pipe, suite, self.prompts, guidance, trailing, eta, own)
        self.extraction = Extraction(suite, self.pipe.device)
        self._sampled: Drawing | None = None
        self._repeated: list[str] = []
        if suite.diversity and self.extraction.network is not None:
            # Several samples of each of the first prompts, from the seeds that follow the suite's own.
            first = (self.prompts or [])[: suite.diversity_prompts]
            self._repeated = [prompt for prompt in first for _ in range(suite.diversity)]
            more = suite.model_copy(update={"n": len(self._repeated), "first_seed": suite.seed(suite.n)})
            self._sampled = Drawing(self.pipe, more, self._repeated, guidance, trailing, eta, own)

    def refuse_another(self, folder: Path) -> None:
        """The folder holds nothing of another evaluation, at whatever step count.

        Raises:
            UserError: it does, or a manifest is damaged.
        """
        for manifest in sorted(folder.glob(f"steps_[0-9]*/{MANIFEST}")):
            steps = int(manifest.parent.name.removeprefix("steps_"))
            claim(manifest.parent, {**self._key, "steps": steps})

    def parts(self, folder: Path, counts: Sequence[int], processes: Processes, *, keyed: bool) -> list[Part]:
        """What this process has to draw. No process may begin before all have asked this.

        Args:
            folder: common to all.
            counts: step counts.
            processes: that draw.
            keyed: the folder stays, so that it must be known whose rows it holds.

        Raises:
            UserError: it holds another evaluation's, or a damaged file.
        """
        key = self._key if keyed and processes.main else {}
        parts = []
        for steps in counts:
            place = steps_folder(folder, steps)
            images = Shards(place, self.suite.n)
            samples = Shards(place, len(self._repeated), "diversity") if self._sampled else None
            every = [images] if samples is None else [images, samples]
            if processes.main:
                place.mkdir(parents=True, exist_ok=True)
                if keyed:
                    claim(place, {**key, "steps": steps})
                (place / SCORES).unlink(missing_ok=True)
                for shards in every:
                    shards.tidy()
                    shards.check()
            missing = [shards.missing() for shards in every]
            own = [numbers[processes.rank :: processes.count] for numbers in missing]
            at_once = min(processes.count, len(missing[0]))
            parts.append(Part(steps, images, samples, own[0], own[1] if samples else [], at_once))
        return parts

    def draw(
        self, part: Part, batch: int, processes: Processes, folder: Path, *, shown: bool, pictures: bool
    ) -> None:
        """Draws this process's shards of a part; the main process waits for those of the others."""
        label = f"{self.suite.label}, {part.steps} step{'s' * (part.steps > 1)}"

        def fill(
            name: str,
            shards: Shards,
            numbers: Sequence[int],
            drawing: Drawing,
            rows_of: Callable[[Tensor, Sequence[str] | None], Rows],
            prompts: Sequence[str] | None,
            side: int,
        ) -> None:
            with bar(shards.count, name, unit="image", first=shards.there(), shown=shown) as moving:

                def advance(more: int) -> None:
                    processes.go_on(folder)
                    if shown:
                        moving.update(max(0, shards.there() + more - moving.n))

                def there() -> bool:
                    advance(0)
                    return not shards.missing()

                draw_shards(
                    shards,
                    numbers,
                    drawing,
                    rows_of,
                    prompts,
                    steps=part.steps,
                    batch=batch,
                    side=side,
                    device=self.pipe.device,
                    processes=part.at_once,
                    advance=advance,
                )
                if processes.main:
                    processes.wait_until(there, folder)

        side = side_of(self.suite.resolution) if pictures else 0
        fill(label, part.images, part.own_images, self.drawing, self.extraction, self.prompts, side)
        if part.samples is not None and self._sampled is not None:
            name, repeated = f"{label}, diversity", self._repeated
            fill(name, part.samples, part.own_samples, self._sampled, self._features, repeated, 0)

    def scores(self, part: Part, reference: Reference, *, pictures: bool) -> StepScores:
        """What all images of a part score; writes their gallery where pictures were kept."""
        cost, count = part.images.cost(), part.images.count
        spread = self._spread(part)
        scores = StepScores(
            **asdict(
                measure(
                    part.images,
                    self.suite,
                    self.extraction.network,
                    reference,
                    self.pipe.device,
                    self.prompts,
                    self.extraction.second,
                )
            ),
            seconds_per_image=cost.seconds / cost.timed,
            network_evaluations=cost.passes / count,
            diversity=spread.value if spread else None,
            diversity_se=spread.standard_error if spread else None,
            images_per_second=cost.timed / cost.share,
            peak_memory_bytes=cost.peak_memory_bytes,
        )
        if pictures:
            kept = make_gallery(part.images, part.images.pictures(), self.prompts)
            kept.save(part.images.folder / FILE)
        return scores

    def _spread(self, part: Part) -> Diversity | None:
        if part.samples is None:
            return None
        features = part.samples.whole("features")  # [P M, D]
        return pairwise_diversity(features.unflatten(0, (-1, self.suite.diversity)))

    def _features(self, pixels: Tensor, prompts: Sequence[str] | None) -> Rows:
        network = self.extraction.network
        assert network is not None
        return {"features": network.images(pixels)}

    @cached_property
    def remarks(self) -> list[str]:
        """What the report should say of how the images were drawn."""
        source = find_pipeline(self._pipeline) if isinstance(self._pipeline, (str, Path)) else self._pipeline
        filters = [f"the {name} of {self.label} is off, as it alters pictures" for name in filters_of(source)]
        return filters + cut_prompts(self.pipe, self.prompts or [])

    @cached_property
    def _key(self) -> dict[str, Any]:
        """All that the rows depend on."""
        suite, protocol = self.suite, protocol_of(self.suite, self.extraction.network)
        return {
            "suite": suite.label,
            "n": suite.n,
            "pipeline": weights_hash(self._pipeline),
            "guidance": self.drawing.guidance,
            "trailing": self._trailing,
            "eta": self._eta,
            "diversity": [suite.diversity, suite.diversity_prompts] if suite.diversity else None,
            **{
                name: value
                for name, value in protocol.items()
                if name.endswith("sha256")
                and not name.startswith(OWN_METRIC)  # which reads rows and makes none
            },
            **({"images": "kept"} if any("images" in metric.needs for metric in suite.own_metrics()) else {}),
        }
