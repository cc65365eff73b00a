"""A shipped suite as a file to edit: every key with what it means, those at their defaults commented out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from stepdistill.evaluation.suite import Suite
from stepdistill.recipes.reference import Key, in_yaml, keys_of
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.shipped import suite_files

HEAD = """# stepdistill eval PIPELINE --suite {file} --steps 1
# A copy of the shipped suite {name}. Another name and version: its scores are not those of {name}.
# A key that is commented out has the value that stands there.
"""


def suite_keys() -> list[Key]:
    """Every key of a suite: the protocol's, and then those of the metrics."""
    return sorted(keys_of(Suite), key=lambda key: not key.own)


def suite_template(name: str, file: Path) -> str:
    """A shipped suite as text for another file.

    Args:
        name: of the suite.
        file: where the text goes; the copy is called after it.
    """
    given: dict[str, Any] = parse_yaml(suite_files()[name].read_text("utf-8"))
    given |= {"name": file.stem, "version": 1}
    given.pop("adds_to", None)  # it is a suite of its own
    lines = [_line(key, given) for key in suite_keys()]
    return HEAD.format(file=file.name, name=name) + "\n".join(lines) + "\n"


def _line(key: Key, given: dict[str, Any]) -> str:
    value = given.get(key.path)
    said = (
        yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else in_yaml(value)
    )
    text = f"{key.path}: {said}" if key.path in given else f"# {key.path}: {key.default}"
    return f"{text.ljust(32)}  # {key.line} ({key.kind})"
