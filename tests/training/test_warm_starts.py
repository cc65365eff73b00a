"""A warm start that another run has made is this run's own, to the last bit, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from run_toy import recipe_of
from safetensors.torch import load_file

from stepdistill.errors import UserError
from stepdistill.losses.adversarial import AdversarialMethod
from stepdistill.losses.fake_score import ScoreMethod
from stepdistill.methods import find_method
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.log import read_stats
from stepdistill.system.shipped import method_names
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.identity import identity, resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data
from stepdistill.training.warm_starts import settings_of

SAME = ("student.times=[1.0, 0.5]", "student.output=teacher", "options.pairs=8", "options.pair_steps=2",
        "options.warm_start=3", "options.fake_updates=1", "options.warm_start_lr_ratio=2.0")  # fmt: skip


def recipe(method, folder, *more):
    kept = [] if folder is None else [f"train.warm_starts={folder}"]
    sets = [one for one in SAME if method != "dmd" or not one.startswith("options.pair")]
    plain = recipe_of("dmd", 7, *sets, *kept, *more)
    if method == "dmd":
        return plain
    known = find_method(method).Options.model_fields
    options = {k: v for k, v in plain.options.items() if k in known and k != "pair_weight"}
    return plain.model_copy(update={"method": method, "options": options})


def run(method, place, folder, *more):
    """The tensors of the last checkpoint, and what training left."""
    wanted = recipe(method, folder, *more)
    place.mkdir()
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(wanted), accelerator, None)
    trained = train(job.objective, training_data(job, place), wanted, place, accelerator)
    files = sorted(checkpoints_in(place / "work" / "checkpoints")[-1].glob("*.safetensors"))
    files = [file for file in files if file.stem != "health"]  # each run watches itself
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}, trained


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd", "ladd"])
def test_a_run_goes_on_from_the_warm_start_of_another_method_to_the_last_bit(method, tmp_path, capsys):
    """Student, optimiser and average, and so all that follows; passes and log are those of a run by itself, and the
    time is that of the stage as it was made. A run that is resumed stays what it is."""
    alone, own = run(method, tmp_path / "alone", None)
    _, first = run("diff_instruct", tmp_path / "first", tmp_path / "kept")
    taken, second = run(method, tmp_path / "second", tmp_path / "kept")
    assert "warm start: 3 updates that first has made" in capsys.readouterr().err
    assert alone.keys() == taken.keys() and all(torch.equal(alone[name], taken[name]) for name in alone)
    assert own.passes.by_network == second.passes.by_network and second.step == 7
    assert (own.warm_start_of, first.warm_start_of, second.warm_start_of) == (None, None, "first")
    rows = [read_stats(tmp_path / name) for name in ("alone", "first", "second")]
    assert [row["update"] for row in rows[2]] == list(range(7)) and rows[2][:3] == rows[1][:3]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[2]]
    assert second.seconds > rows[1][2]["seconds"]
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    ["train.lr=2e-4", "train.seed=3", "options.pair_distance=l1", "options.warm_start=2", "options.guidance=3.0",
     "student.times=[1.0]", "train.batch=2", "train.average=0.5", "options.pairs=4", "train.schedule=linear"],
)  # fmt: skip
def test_other_settings_are_another_warm_start(change):
    plain, other = (settings_of(resolve(recipe("dmd", "kept", *more))) for more in ((), (change,)))
    assert plain is not None and plain != other


@pytest.mark.parametrize(
    "free",
    ["train.updates=40", "train.checkpoint_every=2", "train.preview_every=2", "options.fake_updates=3",
     "options.score_guidance=1.1", "data.pairs=elsewhere", "options.pair_weight=0.5"],
)  # fmt: skip
def test_what_comes_after_it_is_no_part_of_it(free):
    plain, other = (settings_of(resolve(recipe("dmd", "kept", *more))) for more in ((), (free,)))
    assert plain is not None and plain == other


def test_runs_without_a_stage_of_their_own_kind_share_none():
    assert settings_of(resolve(recipe("dmd", "kept", "options.warm_start=0"))) is None
    assert settings_of(resolve(recipe("dmd", "kept", "terms.regression_weight=0.1"))) is None
    assert settings_of(resolve(recipe("dmd", "kept", "train.updates=2"))) is None
    assert settings_of(resolve(load_recipe("phased_dmd_emoji"))) is None
    shared = {settings_of(resolve(load_recipe(name)))["times"][0] for name in ("dmd_emoji", "vdot_emoji")}
    assert shared == {1.0}
    kept, plain = recipe("dmd", "kept"), recipe("dmd", None)
    assert kept != plain and identity(kept) == identity(plain)  # where it lies moves no weight


@pytest.mark.parametrize("name", method_names())
def test_a_method_that_shares_its_start_learns_by_the_same_regression(name):
    kind = find_method(name)
    options = kind.Options()
    if (
        issubclass(kind, (ScoreMethod, AdversarialMethod)) and name != "uni_dad"
    ):  # which takes turns of its own
        options = options.model_copy(update={"warm_start": 5})
        assert kind.shared_start(options) == 5 and kind.shared_start(kind.Options()) == 0
    else:
        assert (
            kind.shared_start(options) == 0 == kind.shared_start(options.model_copy(update={"warm_start": 5}))
        )


def test_a_damaged_one_is_refused_and_a_short_budget_makes_its_own(tmp_path):
    run("dmd", tmp_path / "first", tmp_path / "kept", "train.updates=3")
    _, short = run("dmd", tmp_path / "short", tmp_path / "kept", "train.budget_seconds=1e-9")
    assert short.step == 1 and short.warm_start_of is None
    (file,) = (tmp_path / "kept").glob("*/*/student.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="damaged"):
        run("dmd", tmp_path / "second", tmp_path / "kept")
