"""Whether a name that a file gives stays in its folder."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath


def is_inside(name: str) -> bool:
    """Whether a name is a path below the folder it is told in: not absolute, without ``..``. Links are followed: the
    Hub's cache is made of them."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return "\0" not in name and not any(path.anchor or ".." in path.parts for path in paths) and bool(name)
