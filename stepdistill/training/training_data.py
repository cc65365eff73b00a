"""The data that an assembled run learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.data.prompts import read_rich
from stepdistill.data.training_images import EmbeddedImages, Images
from stepdistill.data.training_videos import examples_of
from stepdistill.errors import UserError
from stepdistill.losses.contract import PairOptions
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import bar, say
from stepdistill.system.processes import Processes
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.assemble import Assembled


def rich_of(recipe: Recipe, prompts: Sequence[str]) -> list[str]:
    """What ``data.rich`` says of each prompt in full; a prompt that it has not says all itself."""
    rich = read_rich(Path(cast(str, recipe.data.rich)))
    if not any(prompt in rich for prompt in prompts):
        raise UserError(
            f"data.rich: {recipe.data.rich} has a rich caption for none of the prompts to train on: give prompts as "
            "data.prompts has them, to the letter"
        )
    return [rich.get(prompt, prompt) for prompt in prompts]


def training_data(run: Assembled, output: Path) -> Data:
    """Everything the method asked for; makes the pairs that are missing.

    Args:
        run: what is trained.
        output: the run folder, where pairs lie that the recipe gives no place.
    """
    recipe, accelerator = run.recipe, run.accelerator
    images: Images | None = None
    if "images" in run.needs and recipe.data.images is None:
        images = EmbeddedImages.read()
    elif "images" in run.needs:
        place = Path(cast(str, recipe.data.images))
        images = found = examples_of(place, run.teacher.size.frames, recipe.data.fps)
        kind = type(run.teacher.pipe).__name__
        run.teacher.family.check_prompts(kind, found.captions, "data.images")
        for remark in found.remarks() if accelerator.is_main_process else ():
            say(remark)
    processes, group = Processes(accelerator.process_index, accelerator.num_processes), recipe.train.group
    pairs, remake, main = None, recipe.data.damaged == "remake", processes.main
    if "pairs" in run.needs:
        folder = Path(recipe.data.pairs) if recipe.data.pairs else RunFolder(output).pairs
        options = run.options
        if not isinstance(options, PairOptions):  # a term's, beside a method without pairs of its own
            options = PairOptions(guidance=options.guidance)
        times = run.method.pair_times() if "states" in run.needs else ()
        seed, dtype = recipe.train.seed, recipe.data.pairs_dtype
        pairs = PairCache(folder, run.teacher, run.prompts, options, seed, times, dtype, remake)
    rich = rich_of(recipe, run.prompts) if "rich" in run.needs else None
    data = Data(
        run.teacher,
        run.prompts,
        recipe.train.seed,
        images,
        pairs,
        processes,
        remake,
        run.buckets,
        group,
        rich,
        run.part,
        recipe.data.part_pairs == "own",
    )
    for remark in data.remarks() if main else ():
        say(remark)
    if pairs is not None:
        shown = bar(pairs.count, "pairs", unit="pair", shown=main)
        pairs.make(data.condition, processes, shown.update)
        shown.close()
        accelerator.wait_for_everyone()
    if accelerator.device.type != "cpu":
        # Every prompt is encoded; pictures bring encoders and decoder back.
        terms = recipe.terms
        decodes = (
            bool({"images", "reward", "looks"} & run.needs) or terms.perceptual_weight or terms.reward_weight
        )
        if run.method.roles.concept is None:  # what learns a word is called at every update
            run.teacher.codec.release("text")
        if not decodes:
            run.teacher.codec.release("vae")
    return data
