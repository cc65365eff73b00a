"""Network passes of a run: as many as its turns ask for, whatever else is drawn on the way."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from run_toy import recipe_of
from tiny import tiny_pipeline, tiny_teacher

from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache, passes_of_pairs
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.passes import Passes
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.recipes.sections import StudentOptions
from stepdistill.training.assemble import assemble
from stepdistill.training.cost import passes_before
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.output_matching import Matching, match_output
from stepdistill.training.training_data import training_data


def kinds(with_graph, without_graph):
    return {"with_graph": with_graph, "without_graph": without_graph}


def test_a_dmd_run_makes_the_passes_of_its_turns(tmp_path):
    """Three updates of the warm start call the student once a sample. Then three cycles: a fake turn draws without a
    graph and calls the fake network with one; a student turn draws with a graph and regresses on pairs, and asks the
    guided teacher (two passes) and the fake network without. A pair is two guided steps. Pictures of previews are no
    part of it, and a pool that another run has drawn counts all the same."""
    pairs = f"data.pairs={tmp_path / 'pairs'}"
    recipe = recipe_of(
        "dmd", 9, "student.times=[1.0]", "student.output=teacher", "train.preview_every=3", pairs
    )
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(recipe), accelerator, None)
        data = training_data(job, folder)
        before = passes_before(job, data)
        assert before.by_network == {"pairs": kinds(0, 8 * 2 * 2)}

        def preview(step, ema, job=job):
            x = torch.zeros(2, *job.teacher.codec.shape)
            job.student.predict(x, torch.ones(2), job.teacher.codec.encode(["0", "1"]))
            return Seen({}, [])

        trained = train(job.objective, data, recipe, folder, accelerator, preview=preview, before=before)
        assert trained.passes.by_network == {
            "pairs": kinds(0, 32),
            "student": kinds(3 * 4 + 3 * 2 * 4, 3 * 4),
            "fake": kinds(3 * 4, 3 * 4),
            "teacher": kinds(0, 3 * 2 * 4),
        }
        assert trained.passes.total == 32 + 48 + 24 + 24


def test_every_sample_of_a_pool_takes_as_many_passes_as_the_one_that_is_counted(tmp_path):
    """Heun asks twice for all steps but the last, guided in two passes each time."""
    teacher = tiny_teacher("sd")
    options = PairOptions(guidance=3.0, pairs=5, pair_steps=3, pair_solver="heun")
    prompts = ["a", "b"]
    data = Data(teacher, prompts, 0)
    cache, drawn = PairCache(tmp_path, teacher, prompts, options, 0), Passes()
    with teacher.denoiser.counter.counting(drawn):
        cache.make(data.condition)
    told = passes_of_pairs(teacher, data.condition(torch.zeros(1, dtype=torch.long)), options)
    assert told.by_network == drawn.by_network
    assert told.total == 5 * 2 * 5


def test_a_start_in_another_output_counts_its_samples_and_its_updates(tmp_path):
    """What the stage itself asks for, but for the probes of its error."""
    options = StudentOptions(output="v", output_samples=3, output_updates=2)
    recipe = recipe_of("dmd", 3, "student.output=v", "student.output_samples=3", "student.output_updates=2",
                       "student.times=[1.0]", "options.warm_start=0", "options.pair_weight=0")  # fmt: skip
    job = assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("sd"))
    told = passes_before(job, training_data(job, tmp_path))
    teacher, drawn = tiny_teacher("sd"), Passes()
    matching = Matching(teacher, "v", ["0", "1"], 2.0, options, 4, 0)
    with teacher.denoiser.counter.counting(drawn):
        match_output(matching, tmp_path / "outputs", autocast=nullcontext)
    probes = (
        2 * 5 * 4 * 4
    )  # twice, five bands, four batches of four: asked of the teacher alone by this counter
    assert drawn.by_network == {"network": kinds(0, 3 * 16 * 2 + 2 * 4 + probes)}
    assert told.by_network == {"start": kinds(2 * 4, 3 * 16 * 2 + 2 * 4)}


def test_features_are_a_pass_and_every_role_counts_as_itself():
    """Of a network that is cut off where its features are, and of adapters on one network."""
    x, t = torch.zeros(3, 4, 8, 8), torch.full((3,), 0.5)
    for kind in (Copies, lambda teacher: Adapters(teacher, 2)):
        teacher = tiny_teacher("sd")
        roles, seen = kind(teacher), Passes()
        fake = roles.add("fake")
        frozen = fake.copy()  # a method's own, such as a checkpoint of the fake network
        cond = teacher.codec.encode(["0", "1", "2"])
        roles.teacher.predict(x, t, cond, guidance=3.0)
        with roles.counter.counting(seen):
            fake.features(x, t, cond)
            with torch.no_grad():
                frozen.raw(x, t, cond)
                roles.student.predict(x, t, cond)
            roles.teacher.predict(x, t, cond, guidance=3.0)
        roles.student.predict(x, t, cond)
        assert seen.by_network == {"fake": kinds(3, 3), "student": kinds(0, 3), "teacher": kinds(0, 6)}
