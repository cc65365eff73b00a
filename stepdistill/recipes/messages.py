"""What is wrong with a recipe, in one line: source, key path, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError

from stepdistill.errors import near_names
from stepdistill.recipes.renamed import old_names, todays_name, todays_value

FEW = 6
"""So many keys are named in a message; more are listed by a command."""

LISTS = {"student.times": "[1.0, 0.5]", "data.size": "[512, 512]", "train.betas": "[0.9, 0.99]"}
"""Key -> a list that it takes."""


def source_prefix(path: str, sources: Mapping[str, str]) -> str:
    """``source: `` of the innermost key at or above ``path`` whose origin is known."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        if source := sources.get(".".join(parts[:depth])):
            return f"{source}: "
    return ""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str,
    owner: str,
    sources: Mapping[str, str],
    method: str = "",
) -> str:
    """One line for all that is wrong: source, key path, what was found and what is allowed.

    Args:
        error: what pydantic found.
        model: in which.
        prefix: of its keys' paths.
        owner: whose keys they are, in words.
        sources: key path -> where it was set.
        method: of whose options the keys are, as a recipe names it.
    """
    found: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        path, section = _locate(problem["loc"], model, prefix)
        if problem["type"] == "extra_forbidden":
            where = owner if section is model else path.rpartition(".")[0]
            text = _unknown(path, section, "an option" if prefix else "a key", where, owner, method)
        elif problem["type"] == "missing":
            text = f"{path} is missing"
        elif problem["type"] == "value_error":
            text = f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        elif problem["type"] == "tuple_type":
            text = f"{path} is {problem['input']!r} and should be a list, such as {LISTS.get(path, '[0.25, 0.75]')}"
            if path == "student.times":
                text += "; a number of steps is set with student.steps"
        elif problem["type"] in ("model_type", "dict_type"):
            text = f"{path} is {problem['input']!r} and should be a section of keys"
        else:
            text = f"{path} is {problem['input']!r} and {_lower(problem['msg'])}"
            if said := todays_value(problem["input"], problem["msg"]):
                text += f" {said}"
        # The members of a union report one after the other under one path.
        texts = found.setdefault(path, [])
        if problem["type"] != "tuple_type" or not texts:
            texts.append(_lower(problem["msg"]).removeprefix("should be ") if texts else text)
    return "; ".join(f"{source_prefix(path, sources)}{' or '.join(texts)}" for path, texts in found.items())


def _lower(message: str) -> str:
    text = message.replace("Input should", "should")
    return text[:1].lower() + text[1:]


def _locate(loc: Sequence[int | str], model: type[BaseModel], prefix: str) -> tuple[str, type[BaseModel]]:
    """The dotted key path of an error, without pydantic's names of union members, and the model it lies in."""
    path, section = prefix, model
    for depth, part in enumerate(loc):
        path = f"{path}.{part}" if path else str(part)
        field = section.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            # What follows is an index into a tuple, or the name of a union's member.
            return path + "".join(f"[{i}]" for i in loc[depth + 1 :] if isinstance(i, int)), section
        section = inner
    return path, section


def _unknown(path: str, section: type[BaseModel], kind: str, where: str, owner: str, method: str) -> str:
    """A key that ``where`` does not have: what it is called today, or the nearest one and how to list all."""
    if said := todays_name(path, owner):
        return said
    names = list(section.model_fields)
    parent, _, key = path.rpartition(".")
    old = {name: new for name, new in old_names(parent).items() if new in names}
    near = list(dict.fromkeys(old.get(name, name) for name in near_names(key, [*names, *old])))
    hint = f"did you mean {', '.join(near)}? " if near else ""
    if len(names) <= FEW:
        return f"{path} is not {kind} of {where} ({hint}it has: {', '.join(names) or 'none'})"
    listing = f"stepdistill ls keys {method}".rstrip()
    return f"{path} is not {kind} of {where} ({hint}`{listing}` lists all)"
