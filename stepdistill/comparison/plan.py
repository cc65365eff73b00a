"""What a comparison of methods is to train: a recipe for each method, checked before the first run starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepdistill.errors import UserError, did_you_mean
from stepdistill.recipes.choose import recipe_of, tree_of
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.system.emoji import embedded_teachers
from stepdistill.system.shipped import method_names, recipe_files
from stepdistill.training.identity import resolve
from stepdistill.training.preflight import check_recipe


@dataclass(frozen=True)
class Entry:
    """One run that is to be there.

    Attributes:
        name: of its folder.
        source: what ``stepdistill train`` is given: a shipped recipe's name or a file.
        arguments: what follows it.
        recipe: what that gives.
        of: the recipe's name, which runs of other training seeds share.
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    recipe: Recipe
    of: str

    def set(self, key: str, value: object) -> Entry:
        """The same with one more key set."""
        sets = [
            part for flag, part in zip(self.arguments, self.arguments[1:], strict=False) if flag == "--set"
        ]
        recipe = load_recipe(self.source, teacher=self.recipe.teacher, sets=[*sets, f"{key}={value}"])
        return replace(self, arguments=(*self.arguments, "--set", f"{key}={value}"), recipe=recipe)


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Attributes:
        entries: the runs.
        without_recipe: the methods of ``all`` that have no recipe.
        seeds: the training seeds of each recipe; empty for that of the recipe.
        remarks: what a user should know before the first run starts, a sentence each.
    """

    entries: tuple[Entry, ...]
    without_recipe: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def repeats(self) -> dict[str, str]:
        """Run -> recipe, where each recipe is trained with several seeds."""
        return {entry.name: entry.of for entry in self.entries} if self.seeds else {}


@dataclass
class _Chosen:
    """Recipes by what was asked for."""

    sources: dict[str, str] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)


def seconds_of(text: str) -> float:
    """A time such as 90s, 10m or 1.5h.

    Raises:
        UserError: anything else, a number without a unit included.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UserError(f"--budget {text}: give a number with its unit, s, m or h, such as 90s, 10m or 1.5h")
    return seconds


def seeds_of(text: str) -> tuple[int, ...]:
    """Training seeds such as 0,1,2.

    Raises:
        UserError: anything else, or a seed that is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(
            f"--seeds {text}: give different whole numbers with commas between them, such as 0,1,2"
        )
    return tuple(map(int, parts))


def plan(
    methods: str, teacher: str, budget: float = 0.0, sets: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Plan:
    """What is to be trained; reads recipes, and imports the methods to check their options.

    Args:
        methods: ``all``, or names of methods or shipped recipes and recipe files, separated by commas.
        teacher: of every run.
        budget: seconds of training of each run; 0 sets no limit.
        sets: assignments laid over every recipe.
        seeds: of the training; each recipe is trained once for each of them. Empty takes the recipe's.

    Raises:
        UserError: a name that is neither, a method without a recipe, a recipe that is not valid or names what is not
            there (of ``all`` it is left out, with a remark), or no recipe that measures anything.
    """
    chosen = _choose(methods, teacher, budget)
    more = [*sets, *([f"train.budget_seconds={budget:g}"] if budget else [])]
    if seeds and any(one.partition("=")[0].strip() == "train.seed" for one in sets):
        raise UserError("--seeds sets train.seed: leave --set train.seed out")
    entries = []
    for source in chosen.sources.values():
        recipe = load_recipe(source, teacher=teacher, sets=more)
        arguments = ("--teacher", teacher, *(part for one in more for part in ("--set", one)))
        name = Path(source).stem
        entries.append(Entry(name, source, arguments, recipe, name))
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--methods: two recipes are called {twice[0]}; rename one")
    if not any(entry.recipe.evaluate for entry in entries):
        raise UserError(
            f"nothing would be measured: evaluate is false in {', '.join(names)}; add --set evaluate=true, or a suite"
        )
    left_out: dict[str, str] = {}
    for entry in entries:  # imports torch: last
        try:
            check_entry(entry)
        except UserError as error:
            if methods.strip() != "all":
                raise
            left_out[entry.name] = str(error)
    if len(left_out) == len(entries):
        raise UserError(next(iter(left_out.values())))
    entries = [entry for entry in entries if entry.name not in left_out]
    remarks = (*_remarks(chosen, entries, teacher), *(f"left out: {why}" for why in left_out.values()))
    if seeds:
        seeded = [entry.set("train.seed", seed) for entry in entries for seed in seeds]
        entries = [replace(entry, name=f"{entry.of}-seed{entry.recipe.train.seed}") for entry in seeded]
    return Plan(tuple(entries), tuple(chosen.without), tuple(seeds), remarks)


def _choose(methods: str, teacher: str, budget: float) -> _Chosen:
    names = [name.strip() for name in methods.split(",") if name.strip()]
    known, shipped = method_names(), recipe_files()
    everything, chosen = names == ["all"], _Chosen()
    for name in known if everything else dict.fromkeys(names):
        if name.endswith((".yaml", ".yml")) or name in shipped:
            chosen.sources[name] = name
        elif name not in known:
            near = did_you_mean(name, [*known, *shipped], "stepdistill ls")
            raise UserError(
                f"--methods: {name} is neither a method nor a recipe {near}; a "
                "method of your own is given by its recipe file, such as my_recipe.yaml"
            )
        elif (found := recipe_of(name, teacher, budget)) is not None:
            chosen.sources[name] = found
        else:
            chosen.without.append(name)
    if (chosen.without and not everything) or not chosen.sources:
        able = [name for name in known if recipe_of(name, teacher, budget) is not None]
        raise UserError(
            f"--methods: no recipe is shipped for {', '.join(chosen.without) or 'nothing'}: write one "
            f"(train/recipes has examples) and give its file; there are recipes for {', '.join(able) or 'no method'}"
        )
    return chosen


def _remarks(chosen: _Chosen, entries: Sequence[Entry], teacher: str) -> tuple[str, ...]:
    """Which recipe each method takes, and what of it is another teacher's."""
    taken = [f"{name} takes {found}" for name, found in chosen.sources.items() if name != found]
    foreign = sorted({tree_of(recipe_files()[found]).get("teacher", "") for name, found in chosen.sources.items()
                      if found in recipe_files()} - {teacher})  # fmt: skip
    said = []
    if taken and foreign:
        said.append(
            f"{teacher} has no recipes of its own: {', '.join(taken)}. Guidance, rate and updates there are for "
            f"{', '.join(foreign)}; set yours with --set, or give a recipe file"
        )
    elif taken:
        said.append(", ".join(taken))
    blind = [entry.name for entry in entries if not entry.recipe.evaluate]
    if blind:
        said.append(f"not measured, as evaluate is false: {', '.join(blind)}")
    return tuple(said)


def check_entry(entry: Entry) -> None:
    """The recipe's options are its method's, and what it names is there: teacher, prompts, images, suite.

    Raises:
        UserError: something is not, of the recipe named first.
    """
    from stepdistill.families import known_family
    from stepdistill.families.kinds import LabelFamily
    from stepdistill.networks.find import local_folder
    from stepdistill.networks.pipeline_files import pipeline_class

    recipe = entry.recipe
    try:
        check_recipe(recipe)
        resolved = resolve(recipe)
        needs = resolved.options.needs | recipe.terms.needs
        embedded = recipe.teacher in embedded_teachers()
        if resolved.kind.of_few_steps and embedded:
            raise UserError(
                f"it goes on from a student of few steps, which {recipe.teacher} is not: give --teacher RUN"
            )
        if "images" in needs and recipe.data.images is None and not embedded:
            raise UserError("it learns from images: add --set data.images=FOLDER")
        folder = local_folder(recipe.teacher)
        if recipe.data.prompts is None and not embedded and folder is not None:
            family = known_family(pipeline_class(folder))
            if family is not None and not isinstance(family, LabelFamily):
                raise UserError(f"{recipe.teacher} draws from prompts: add --set data.prompts=FILE")
    except UserError as error:
        raise UserError(f"{entry.name}: {error}") from None
