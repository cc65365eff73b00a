"""Where the files lie that a suite names: prompts, statistics, heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.system.shipped import cache_folder, content_folder


@dataclass(frozen=True)
class SuiteFiles:
    """What a suite looks for.

    Attributes:
        label: of the suite, for messages.
        folder: where its file lies.
        source: where the files come from, for the message that one is missing; empty where nobody said.
    """

    label: str
    folder: Path
    source: str

    def places(self, kind: str) -> tuple[Path, ...]:
        """Where a file that is named without a folder is looked for; kind is ``prompts`` or ``reference``."""
        return self.folder, content_folder("eval") / kind, cache_folder() / kind

    def find(self, name: str, kind: str) -> Path | None:
        """The file in the first place that has it, None where none has; an absolute path stays what it is."""
        given = Path(name).expanduser()
        return next((file for folder in self.places(kind) if (file := folder / given).is_file()), None)

    def found(self, what: str, name: str, kind: str, advice: str) -> Path:
        """The same, which has to be there; what and advice are for the message.

        Raises:
            UserError: there is no such file.
        """
        file = self.find(name, kind)
        if file is None:
            source = self.source and f" (from: {self.source})"
            absolute = Path(name).expanduser().is_absolute()
            looked = "" if absolute else f" in {', '.join(map(str, self.places(kind)))}"
            raise UserError(f"suite {self.label}: no {what} {name}{looked}{source}; {advice}")
        return file
