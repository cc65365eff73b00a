"""Turning a network into another output kind: its trajectories, its error, its cache, and the student that follows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from tiny import tiny_pipeline, tiny_prompts

from stepdistill.diffusion.path import Output, TablePath
from stepdistill.errors import UserError
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.families.condition import Condition
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.roles import Adapters
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.sections import StudentOptions
from stepdistill.testing.toys import Gaussian, Perceptron, ToyCodec, ToyTeacher
from stepdistill.training import output_matching
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import resolve
from stepdistill.training.output_matching import Matched, Matching, NoisedSamples, match_output, output_of

EMPTY = HERE / "empty.yaml"


def matching(teacher: PipelineTeacher, steps: int = 12, **options: Any) -> Matching:
    wanted = StudentOptions(
        output="v", output_updates=steps, **{"output_lr": 1e-3, "output_samples": 16, **options}
    )
    return Matching(teacher, "v", tiny_prompts("sd", 6), 2.0 if teacher.null else 1.0, wanted, 8, 0)


def run(wanted: Matching, cache: Path, stop: int | None = None) -> Matched:
    """The stage; with ``stop`` it is cut off after so many updates."""
    made = [0]

    def progress(updates: int) -> None:
        made[0] += updates
        if stop is not None and made[0] >= stop:
            raise KeyboardInterrupt

    return match_output(wanted, cache, autocast=nullcontext, progress=progress)


def test_auto_is_v_where_an_eps_network_is_called_near_pure_noise_alone() -> None:
    auto = StudentOptions()
    assert [output_of(auto, "eps", (t,)) for t in (1.0, 0.9, 0.625)] == ["v", "v", "eps"]
    assert output_of(auto, "eps", (1.0, 0.5)) == "eps"
    assert [output_of(auto, kind, (1.0,)) for kind in ("v", "x0", "velocity")] == ["v", "x0", "velocity"]
    assert output_of(StudentOptions(output="teacher"), "eps", (1.0,)) == "eps"
    assert output_of(StudentOptions(output="x0"), "eps", (0.4, 0.2)) == "x0"


TABLE = TablePath.from_alphas_cumprod(torch.linspace(0.9999**0.5, 0.05**0.5, 1000).square())


class Labelled(ToyCodec):
    def encode(self, prompts: list[str]) -> Condition:
        return Condition({"label": torch.zeros(len(prompts))})


def toy_teacher(net: torch.nn.Module, output: Output) -> Any:
    """A closed-form teacher that encodes prompts and has a fingerprint."""
    teacher: Any = ToyTeacher(net, TABLE, output)
    teacher.codec = Labelled()
    teacher.fingerprint, teacher.guidance_interval, teacher.guidance_rescale = lambda: "toy", (0.0, 1.0), 0.0
    teacher.guidance_2 = None
    return teacher


def test_states_are_the_teachers_samples_noised_to_evenly_spread_times(tmp_path: Path) -> None:
    """The samples of a Gaussian's teacher have its deviation, and a batch has one time in each of its equal parts."""
    options = StudentOptions(output_samples=512)
    made = Matching(toy_teacher(Gaussian(TABLE, 0.0, 0.8), "x0"), "v", ["a", "b"], 1.0, options, 256, 0)
    told: list[int] = []
    states = NoisedSamples(made, tmp_path, told.append)
    assert told == [256, 256]
    x, t, _ = states.at(3, "probe", 0.2, 0.7)
    assert torch.equal(((t - 0.2) / 0.5 * 256).ceil().long(), torch.arange(1, 257))
    alpha, sigma = TABLE.alpha_sigma(t)
    ratio = x.flatten(1).square().mean(1) / ((alpha * 0.8).square() + sigma.square())
    assert ratio.mean() == pytest.approx(1, abs=0.1)
    assert not torch.equal(states.at(4, "probe")[0], states.at(5, "probe")[0])
    kept, rows = NoisedSamples(made, tmp_path, told.append).samples, torch.arange(512)
    assert told == [256] * 4
    # A Gaussian's ODE scales its noise; 16 steps end 6 % too narrow, whatever the noise is.
    assert kept.clean(rows).std() / kept.noise(rows).std() == pytest.approx(0.8, abs=0.06)


def test_the_turned_network_says_what_the_teacher_says(tmp_path: Path) -> None:
    options = StudentOptions(output="v", output_updates=600, output_lr=1e-2, output_samples=256)
    made = Matching(toy_teacher(Perceptron(), "eps"), "v", ["a"], 1.0, options, 64, 0)
    found = run(made, tmp_path)
    assert found.denoiser.output == "v" and not found.adapter
    assert all(now < 0.2 * was for was, now in zip(found.before, found.after, strict=True))
    # What is stated is what there is.
    states = NoisedSamples(made, tmp_path / "samples", lambda samples: None)
    assert states.errors(found.denoiser) == pytest.approx(found.after, rel=1e-4)
    assert not any(value.requires_grad for value in found.denoiser.net.parameters())


def test_an_embedded_scale_is_the_recipes_in_what_is_matched(tmp_path: Path) -> None:
    """In the teacher's own kind its copy, which has the scale folded in, has nothing to learn; at scale 1 it would."""
    pipe = tiny_pipeline("sd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=32)
        torch.nn.init.normal_(net.time_embedding.cond_proj.weight, std=0.3)
    pipe.register_modules(unet=net)
    teacher = PipelineTeacher(pipe, guidance=7.5)
    options = StudentOptions(output_samples=8)
    made = Matching(teacher, "eps", tiny_prompts("sd", 2), 7.5, options, 4, 0)
    states = NoisedSamples(made, tmp_path, lambda samples: None)
    assert max(states.errors(made.network()[0])) < 1e-4
    x, t, cond = states.at(0, "match")
    assert float((made.wanted(x, t, cond).eps - teacher.predict(x, t, cond).eps).abs().max()) > 0.01
    other = PipelineTeacher(pipe, guidance=3.0)
    assert Matching(other, "eps", made.prompts, 7.5, options, 4, 0).key != made.key


@pytest.mark.slow
def test_a_stage_cut_off_goes_on_bit_for_bit_and_is_then_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_matching, "EVERY", 4)
    teacher = PipelineTeacher(tiny_pipeline("sd"))
    whole = run(matching(teacher), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(matching(teacher), tmp_path / "parts", stop=7)
    parts = run(matching(teacher), tmp_path / "parts")
    for found in (parts, run(matching(teacher), tmp_path / "whole")):
        assert found.before == whole.before and found.after == whole.after
        for one, other in zip(found.denoiser.net.parameters(), whole.denoiser.net.parameters(), strict=True):
            assert torch.equal(one, other)
    # A second run made no update: it would have had to say so.
    told: list[int] = []
    match_output(matching(teacher), tmp_path / "whole", autocast=nullcontext, progress=told.append)
    assert told == [12]
    assert [file.name for file in (tmp_path / "whole" / matching(teacher).key).iterdir()] == ["step-00000012"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: Matching(m.teacher, "x0", m.prompts, m.guidance, m.options, m.batch, m.seed),
        lambda m: Matching(m.teacher, m.output, m.prompts[:3], m.guidance, m.options, m.batch, m.seed),
        lambda m: Matching(m.teacher, m.output, m.prompts, 3.0, m.options, m.batch, m.seed),
        lambda m: Matching(m.teacher, m.output, m.prompts, m.guidance, m.options, 4, m.seed),
        lambda m: Matching(m.teacher, m.output, m.prompts, m.guidance, m.options, m.batch, 1),
        lambda m: matching(m.teacher, steps=13),
        lambda m: matching(m.teacher, output_samples=17),
        lambda m: matching(m.teacher, lora_rank=2),
    ],
)
def test_the_key_tells_apart_what_the_result_depends_on(
    change: Callable[[Matching], Matching], teacher_of: Callable[[str], PipelineTeacher]
) -> None:
    base = matching(teacher_of("sd"))
    assert base.key == matching(teacher_of("sd")).key != change(base).key


@pytest.mark.slow
def test_an_adapter_alone_turns_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = PipelineTeacher(tiny_pipeline("sd"))
    found = run(matching(teacher, steps=30, output_lr=1e-2, lora_rank=4), tmp_path)
    assert found.adapter and all(".lora_" in name for name in found.adapter)
    assert sum(found.after) < sum(found.before)
    # What roles start from is that adapter on the teacher's own network.
    roles = Adapters(teacher, 4, output="v", start=found.adapter)
    x, t, cond = (
        torch.randn(2, *teacher.codec.shape),
        torch.tensor([0.9, 0.3]),
        teacher.codec.encode(["a", "b"]),
    )
    with torch.no_grad():
        turned = found.denoiser.raw(x, t, cond)
        assert torch.equal(roles.student.raw(x, t, cond), turned)
        assert (teacher.denoiser.raw(x, t, cond) - turned).abs().max() > 1e-3
    assert teacher.denoiser.adapter is None and not lora_layers(teacher.denoiser.net)


def job_of(teacher: Any, *sets: str) -> Assembled:
    common = [
        f"data.prompts={HERE / 'prompts.txt'}",
        "train.batch=4",
        "student.output=v",
        "student.output_updates=3",
    ]
    more = ["options.guidance=2.0", "student.output_samples=8", "student.output_lr=1e-3"]
    recipe = load_recipe(EMPTY, method="dmd", sets=[*common, *more, *sets])
    return assemble(resolve(recipe), Accelerator(cpu=True), teacher)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_student_and_follower_start_as_the_turned_network_and_the_folder_says_its_kind(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(EMPTY.parents[1])
    job = job_of(tiny_pipeline("sd"), f"student.lora_rank={rank}")
    method: Any = job.method
    x, t = torch.randn(4, *job.teacher.codec.shape), torch.full((4,), 0.7)
    cond = job.teacher.codec.encode(job.prompts[:4])
    with torch.no_grad():
        start = (job.student if rank else job.teacher.start).raw(x, t, cond)
        assert (start - job.teacher.denoiser.raw(x, t, cond)).abs().max() > 1e-3
        torch.testing.assert_close(job.student.raw(x, t, cond), start, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(method.fake.raw(x, t, cond), start, atol=1e-5, rtol=1e-4)
    assert job.student.output == method.fake.output == "v" and job.teacher.denoiser.output == "eps"
    export(
        job.student,
        job.sampler,
        job.teacher,
        tmp_path / "student",
        job.prompts[:2],
        "# A card\n",
        seeds=(0, 1),
    )
    config = (tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text()
    assert '"prediction_type": "v_prediction"' in config
    assert verify(tmp_path / "student").worst <= 1


def test_a_flow_teacher_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(EMPTY.parents[1])
    with pytest.raises(
        UserError, match=r"student\.output is v, but a flow teacher's student says its velocity"
    ):
        job_of(tiny_pipeline("sd3"))
    job = job_of(tiny_pipeline("sd3"), "student.output=auto")
    assert job.student.output == "velocity" and not (tmp_path / "cache").exists()
