"""What is wrong with a recipe, in one line: source, key path, what was found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError

from stepdistill.recipes.renamed import old_names, todays_name, todays_value


def source_prefix(path: str, sources: Mapping[str, str]) -> str:
    """``source: `` of the innermost key at or above ``path`` whose origin is known."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        if source := sources.get(".".join(parts[:depth])):
            return f"{source}: "
    return ""


def explain(
    error: ValidationError, model: type[BaseModel], prefix: str, owner: str, sources: Mapping[str, str]
) -> str:
    """One line for all that is wrong: source, key path, what was found and what is allowed."""
    found: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        path, section = _locate(problem["loc"], model, prefix)
        if problem["type"] == "extra_forbidden":
            text = _unknown(path, section, model, prefix, owner)
        elif problem["type"] == "missing":
            text = f"{path} is missing"
        elif problem["type"] == "value_error":
            text = f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        elif problem["type"] in ("model_type", "dict_type"):
            text = f"{path} is {problem['input']!r} and should be a section of keys"
        else:
            text = f"{path} is {problem['input']!r} and {_lower(problem['msg'])}"
            if said := todays_value(problem["input"], problem["msg"]):
                text += f" {said}"
        # The members of a union report one after the other under one path.
        texts = found.setdefault(path, [])
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


def _unknown(path: str, section: type[BaseModel], model: type[BaseModel], prefix: str, owner: str) -> str:
    if said := todays_name(path, owner):
        return said
    names = list(section.model_fields)
    parent, _, key = path.rpartition(".")
    old = {name: new for name, new in old_names(parent).items() if new in names}
    near = difflib.get_close_matches(key, [*names, *old], n=1, cutoff=0.5)
    hint = f"did you mean {old.get(near[0], near[0])}? It" if near else "it"
    kind = "an option" if prefix else "a key"
    where = owner if section is model else parent
    return f"{path} is not {kind} of {where} ({hint} has: {', '.join(names) or 'none'})"
