"""YAML of files that anyone may have made: what cannot be read is one kind of error, and none takes long.

PyYAML raises a dozen kinds of errors on made-up texts (a month 13 is a ValueError, a thousand brackets a
RecursionError), and a page of YAML with aliases of aliases stands for more values than memory has. Imports no torch.
"""

from __future__ import annotations

from typing import Any

import yaml

from stepdistill.system.parsing import DEEPEST, Unreadable

MOST_VALUES = 100_000
"""Values that a YAML text may stand for once its aliases are written out."""
LONGEST = 4 << 20
"""Characters of a YAML text; its reader takes a second for a hundred thousand."""


def parse_yaml(text: str) -> Any:
    """What a YAML text says: plain values, lists and mappings, whatever tags it has.

    Raises:
        Unreadable: it is not YAML, has a tag of other than plain values, a key twice, or is nested or repeated beyond
            what a file for people needs.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"{len(text)} characters long; {LONGEST} are allowed")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise Unreadable(str(error.problem), line) from None
    except Exception as error:  # a constructor of a made-up value raises anything
        raise Unreadable(str(error) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST}", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if node not in self._values:
                raise yaml.composer.ComposerError(
                    None, None, f"the alias {event.anchor} lies in what it stands for", mark
                )
        else:
            inner = node.value if isinstance(node.value, list) else []
            parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
            self._values[node] = 1 + sum(self._values[part] for part in parts)
        if self._values[node] > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"stands for more than {MOST_VALUES} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)
