"""What ``stepdistill doctor`` found, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stepdistill.system.parsing import printable

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``note`` is worth knowing, ``broken`` stops some command from working."""

    state: State
    subject: str
    text: str


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints them with their subjects in one column."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(printable(f"{finding.state.ljust(6)}  {finding.subject.ljust(width)}  {finding.text}"))
