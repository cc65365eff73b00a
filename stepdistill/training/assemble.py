"""What a recipe comes to: teacher, student, method, sampler and data, fitting together; and its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.attention.kernels import check_attention, use_xformers
from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.data.prompts import read_prompts
from stepdistill.data.training_images import EmbeddedImages, ImageFolder, Images
from stepdistill.diffusion.path import TablePath
from stepdistill.errors import UserError
from stepdistill.evaluation.drawing import cut_prompts
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.scores import by_metric
from stepdistill.evaluation.suite import load_suite
from stepdistill.evaluation.teacher_scores import gap_closed, teacher_scores
from stepdistill.export.card import model_card, with_code_note
from stepdistill.export.schedulers import check_sampler
from stepdistill.export.student_folder import check_export, export
from stepdistill.export.verify import verify
from stepdistill.families.base import LabelFamily
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.load import load_features
from stepdistill.losses.contract import Method, MethodOptions, PairOptions
from stepdistill.losses.terms import WithTerms
from stepdistill.methods import find_method, method_options
from stepdistill.networks.averages import averaged
from stepdistill.networks.find import find_teacher
from stepdistill.networks.loading import load_teacher, taken_as
from stepdistill.networks.pictures import draw_as_pipeline, teacher_pictures, to_uint8
from stepdistill.networks.scheduler_path import PREDICTION_TYPES
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pages.sheets import rows_of_pictures
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.emoji import embedded_teachers, emoji_captions
from stepdistill.system.log import bar, read_stats, say
from stepdistill.system.memory import peak_memory
from stepdistill.system.provenance import provenance
from stepdistill.system.shipped import cache_folder, module_summaries
from stepdistill.training.output_matching import Matching, match_output, output_of
from stepdistill.training.report import write_report
from stepdistill.training.run import Trained

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


TEACHER_STEPS = 25
"""Steps of the teacher's pictures where no suite says otherwise."""


class Job:
    """A recipe's teacher, student, method and sampler, loaded and checked against each other.

    Args:
        recipe: what to do.
        accelerator: where.
        pipeline: the teacher, where it is an object.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, pipeline: DiffusionPipeline | None) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        device = accelerator.device
        # What the report states is what ran: files may change while a long run is under way.
        self.origin, self.began = provenance(device), time.perf_counter()
        kind = find_method(recipe.method)
        self.options: MethodOptions = method_options(recipe)
        self.needs = kind.needs_of(self.options) | recipe.terms.needs
        check_attention(recipe.train.attention, device)
        self.embedded = pipeline is None and recipe.teacher in embedded_teachers()
        if "images" in self.needs and recipe.data.images is None and not self.embedded:
            raise UserError(
                f"{recipe.method} with these options learns from images: give a folder in data.images"
            )
        self.source: Any = pipeline if pipeline is not None else find_teacher(recipe.teacher)
        self.teacher = PipelineTeacher(
            pipeline or load_teacher(recipe.teacher),
            device,
            guidance_interval=self.options.guidance_interval,
            shift=self.options.shift,
            guidance=self.options.guidance,
            guidance_rescale=self.options.guidance_rescale,
        )
        self.changes = taken_as(self.source)
        if self.teacher.null is None:
            self._without_guidance()
        self.prompts = self._prompts()
        for remark in cut_prompts(self.teacher.pipe, self.prompts) if accelerator.is_main_process else ():
            say(remark)
        times = tuple(recipe.student.times or kind.default_times)
        if not recipe.student.times and kind.shifted_times:
            times = tuple(self.teacher.path.shifted(time) for time in times)
        if times[0] < 1 and not kind.starts_below:
            raise UserError(
                f"student.times starts at {times[0]:g}, but {recipe.method} learns from what starts as pure noise: "
                "set 1.0, or take a method that matches distributions, such as dmd or sid"
            )
        adapter = self._match_output(times, kind.own_network)
        self.student = Student.from_teacher(
            self.teacher, recipe.student.lora_rank, recipe.student.lora_alpha, adapter
        )
        if recipe.train.attention == "xformers":
            use_xformers(self.student.net)
            use_xformers(self.teacher.start.net)
        self.method: Method = kind(self.teacher, self.student, times, self.options).to(device)
        sampler = self.method.sampler()
        if self.student.output != self.teacher.denoiser.output:
            sampler = replace(sampler, prediction_type=PREDICTION_TYPES[self.student.output])
        self.sampler = sampler.on_grid_of(self.student.path, self.teacher.pipe.scheduler)
        check_sampler(self.sampler, self.student.path, self.teacher.family)
        self.method.times = self.sampler.times
        if recipe.terms.needs:
            self.method = WithTerms(self.method, recipe.terms, self._embed()).to(device)
        # Only now: the student and its followers are float32 copies of the teacher, and exported is what was loaded.
        low = (recipe.train.teacher_precision or recipe.train.precision) == "bf16"
        self.teacher.compute_in(torch.bfloat16 if low else torch.float32)
        if accelerator.is_main_process:
            check_export(self.student, self.sampler, self.teacher, self.prompts[0])

    def _without_guidance(self) -> None:
        """The options of a teacher that has no unconditional mode: a method's own default guidance is 1 there."""
        guidance = self.options.guidance
        if guidance not in (1.0, type(self.options)().guidance):
            raise UserError(
                f"options.guidance is {guidance:g}, but {self.recipe.teacher} has no unconditional mode: set 1"
            )
        self.options = self.options.model_copy(update={"guidance": 1.0})

    def _match_output(self, times: tuple[float, ...], own_network: bool) -> dict[str, Tensor]:
        """Turns what student and follower start as into ``student.output``, where that is not the teacher's own; the
        adapter that does it, where the student is one."""
        recipe, own = self.recipe, self.teacher.denoiser.output
        output = output_of(recipe.student, own, times)
        if output == own or (own_network and recipe.student.output == "auto"):
            return {}
        if not isinstance(self.teacher.path, TablePath):
            raise UserError(
                f"student.output is {output}, but a flow teacher's student says its velocity, which has no trouble at "
                "pure noise: set student.output=teacher"
            )
        matching = Matching(
            self.teacher,
            output,
            self.prompts,
            self.options.guidance,
            recipe.student,
            recipe.train.batch,
            recipe.train.seed,
        )
        steps, main = recipe.student.output_steps, self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # the others find it in the cache
            drawn = bar(recipe.student.output_samples, "samples", unit="sample", shown=main, lazy=True)
            shown = bar(steps, f"{own} to {output}", unit="update", shown=main, lazy=True)
            found = match_output(
                matching,
                cache_folder() / "outputs",
                autocast=self.accelerator.autocast,
                drawn=drawn.update,
                progress=shown.update,
            )
            drawn.close()
            shown.close()
        if main:
            say(f"{own} to {output}, error of v at t up to " + found.summary)
        self.teacher.start = found.denoiser
        return found.adapter

    def _embed(self) -> Callable[[Tensor], Tensor] | None:
        """Latents to features of their images, with a graph; None where no term asks for it."""
        terms = self.recipe.terms
        if not terms.perceptual_weight:
            return None
        network = cast(ClipFeatures, load_features(terms.perceptual, device=self.accelerator.device))
        family, pipe = self.teacher.family, self.teacher.pipe
        return lambda latents: network.embed(255 * family.to_images(pipe, latents))

    def _prompts(self) -> list[str]:
        family, file = self.teacher.family, self.recipe.data.prompts
        if file is not None:
            return read_prompts(Path(file))
        if self.embedded:
            return emoji_captions()
        if isinstance(family, LabelFamily):
            return [str(label) for label in range(max(1, family.classes(self.teacher.pipe)))]
        raise UserError(
            f"{self.recipe.teacher} draws from prompts: give a text file with one a line in data.prompts"
        )

    def shown(self, count: int) -> list[str]:
        """Prompts spread over all, for pictures."""
        return [self.prompts[i * len(self.prompts) // count] for i in range(count)]

    def data(self, output: Path) -> Data:
        """Everything the method asked for; makes the pairs that are missing."""
        recipe, accelerator = self.recipe, self.accelerator
        images: Images | None = None
        if "images" in self.needs and recipe.data.images is None:
            images = EmbeddedImages.read()
        elif "images" in self.needs:
            images = found = ImageFolder.read(Path(cast(str, recipe.data.images)))
            for remark in found.remarks() if accelerator.is_main_process else ():
                say(remark)
        pairs = None
        if "pairs" in self.needs:
            folder = Path(recipe.data.pairs) if recipe.data.pairs else output / "pairs"
            options = self.options
            if not isinstance(options, PairOptions):  # a term's, beside a method without pairs of its own
                options = PairOptions(guidance=options.guidance)
            times = self.method.pair_times() if "states" in self.needs else ()
            pairs = PairCache(folder, self.teacher, self.prompts, options, recipe.train.seed, times)
        data = Data(self.teacher, self.prompts, recipe.train.seed, images, pairs)
        if pairs is not None:
            shown = bar(pairs.count, "pairs", unit="pair", shown=accelerator.is_main_process)
            pairs.make(data.condition, accelerator.process_index, accelerator.num_processes, shown.update)
            shown.close()
            accelerator.wait_for_everyone()
        return data

    def card(self, command: str, report: dict[str, Any] | None = None) -> str:
        """The student's model card."""
        pipeline = self.teacher.family.student_pipeline(self.teacher.pipe) or type(self.teacher.pipe).__name__
        prompts = self.teacher.family.call_prompts(self.teacher.pipe, self.shown(1))
        call = self.teacher.family.call_arguments(pipeline, prompts, self.sampler.guidance or 0.0)
        return model_card(
            teacher=self.recipe.teacher,
            method=Path(self.recipe.method).stem,
            summary=module_summaries("methods").get(self.recipe.method, self.recipe.method),
            steps=self.sampler.steps,
            guidance=self.options.guidance,
            call={**call, "num_inference_steps": self.sampler.steps, **self.sampler.call_arguments()},
            command=command,
            changes=self.changes,
            report=report,
        )

    def export(self, folder: Path, command: str) -> None:
        """Writes the student folder with the network's present weights."""
        export(self.student, self.sampler, self.teacher, folder, self.shown(4), self.card(command))

    def finish(self, output: Path, trained: Trained, command: str | None) -> dict[str, Any]:
        """Exports, verifies, evaluates, draws and reports, with the averaged weights where there are any."""
        recipe, device, origin = self.recipe, self.accelerator.device, self.origin
        command = command or str(origin["command"])
        with averaged(trained.ema):
            self.export(output / "student", command)
            proof = verify(output / "student")
            report: dict[str, Any] = {
                "name": output.name,
                "method": recipe.method,
                "summary": module_summaries("methods").get(recipe.method, recipe.method),
                "teacher_name": recipe.teacher,
                "suite": None,
                "n": 0,
                "teacher": {"fd": {}, "clip_score": {}},
                "student": {"fd": {}, "clip_score": {}},
                "gap_closed": {},
                "recall_of_teachers": {},
                **self._scores(output / "student"),
                "teacher_changes": self.changes,
                "verification": str(proof),
                "updates": trained.step,
                "updates_planned": recipe.train.steps,
                "train_seconds": round(trained.seconds, 1),
                "wall_seconds": round(time.perf_counter() - self.began, 1),
                "peak_memory_bytes": peak_memory(device),
                **origin,
                "command": command,
            }
            self._samples(output / "samples.png")
        card = with_code_note(self.card(command, report), output / "student")
        (output / "student" / "README.md").write_text(card, encoding="utf-8")
        write_report(output, report, read_stats(output))
        return report

    def _scores(self, student: Path) -> dict[str, Any]:
        """Teacher and student on the recipe's suite, as report.json has them; nothing where there is no suite."""
        wanted = self.recipe.evaluate
        if wanted is False or (wanted is True and not self.embedded):
            return {}
        suite = load_suite("emoji" if wanted is True else str(wanted))
        counts, guidance = self.sampler.step_counts, self.options.guidance
        drawn = evaluate(
            student,
            suite,
            steps=counts,
            guidance=self.sampler.guidance,
            device=self.accelerator.device,
            eta=self.sampler.gamma or None,
        )
        asked = sorted({1, *counts, suite.teacher_steps})
        guided = teacher_scores(
            self.source, suite, steps=asked, guidance=guidance, device=self.accelerator.device
        )
        plain = teacher_scores(self.source, suite, steps=1, guidance=1.0, device=self.accelerator.device)
        # The teacher at one step is taken at its better guidance, so that the gap is not flattered.
        best = min(guided[1], plain[1], key=lambda scores: math.inf if scores.fd is None else scores.fd)
        teachers = {**guided, 1: best}
        full = guided[suite.teacher_steps]
        try:
            gaps = {
                str(k): gap_closed(v.fd, best.fd, full.fd)
                for k, v in drawn.scores.items()
                if not (v.fd is None or best.fd is None or full.fd is None)
            }
        except UserError as error:  # every other number stands all the same
            gaps = {}
            say(f"gap closed is left out: {error}")
        return {
            "suite": suite.label,
            "n": suite.n,
            "metrics": dict(drawn.metrics),
            "protocol": dict(drawn.protocol),
            "guidance": guidance,
            "teacher": by_metric(teachers),
            "student": by_metric(drawn.scores),
            "gap_closed": gaps,
            # Of the teacher at full steps; a student below 0.9 of it has lost some of what the teacher draws.
            "recall_of_teachers": {
                str(k): v.recall / full.recall
                for k, v in drawn.scores.items()
                if v.recall is not None and full.recall
            },
        }

    def _samples(self, file: Path) -> None:
        """samples.png: the same prompts and seeds by the teacher at full steps, at the student's, and the student."""
        prompts, seeds, steps = self.shown(16), list(range(16)), self.sampler.steps
        guidance = self.options.guidance
        full = teacher_pictures(self.teacher, prompts, seeds, TEACHER_STEPS, guidance)
        few = teacher_pictures(self.teacher, prompts, seeds, steps, guidance)
        own = draw_as_pipeline(self.student, self.sampler, self.teacher, prompts, seeds)
        rows = [
            (f"teacher, {TEACHER_STEPS} steps", to_uint8(full)),
            (f"teacher, {steps} step{'s' * (steps > 1)}", to_uint8(few)),
            (f"student, {steps} step{'s' * (steps > 1)}", to_uint8(own)),
        ]
        rows_of_pictures(rows).save(file)
