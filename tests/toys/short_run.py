"""Four steps of DMD on a tiny transformer, cut off where asked."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from run_toy import HERE
from safetensors.torch import load_file
from tiny import tiny_pipeline
from torch import Tensor

from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

LOW = "train.precision=bf16"


def run(folder: Path, *more: str, last: int = 4, resume: bool = False) -> tuple[dict[str, Tensor], Assembled]:
    """Every tensor of the checkpoint after four steps of DMD, or after ``last``, where the run is cut off."""
    sets = [
        *("student.output=teacher", "train.updates=4", "train.batch=2", "train.lr=1e-3", "train.average=0.5"),
        *(
            "train.checkpoint_every=2",
            "train.preview_every=1",
            "evaluate=false",
            "options.fake_updates=1",
            *more,
        ),
    ]
    recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, tiny_pipeline("dit"))

    def preview(step: int, ema: Ema | None) -> Seen:
        if step > last:
            raise KeyboardInterrupt
        return Seen({}, [])

    data = training_data(job, folder)
    train(job.objective, data, recipe, folder, accelerator, resume=resume, preview=preview)
    files = sorted(checkpoints_in(folder / "work" / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}, job
