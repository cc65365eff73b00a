"""What two reports did not measure alike. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from stepdistill.training.run_report import Measured, RunReport

# Numbers under two values of one of these cannot be ranked, nor of any field of the protocol that both reports state.
SAME_FIELDS = ("suite", "n")
# What only adds a score or an error of its own moves no other.
APART = ("diversity", "standard_errors")
# What makes an evaluation's number mean anything: a report that does not state it is not ranked with one that does.
ESSENTIAL = ("resize", "features_sha256", "reference_sha256", "suite_sha256")


def differences(reports: Sequence[Measured]) -> list[str]:
    """What was not measured alike, each field with its values. Command, machine, versions, commit and times do not
    matter; neither do seeds of images that were there already, which nobody states. Suites of one hash are alike: the
    later version has every score of the earlier."""
    protocols = [report.protocol for report in reports]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    hashes = {protocol.get("suite_sha256") for protocol in protocols}
    same = ("n",) if len(hashes) == 1 and None not in hashes else SAME_FIELDS
    found = [_values(field, ((report, getattr(report, field)) for report in reports)) for field in same]
    for key in sorted(keys, key=lambda key: key == "suite_sha256"):  # which differs with most others: last
        if key not in APART:
            needed = key in ESSENTIAL
            stated = (
                (
                    report,
                    protocol.get(key, "not stated" if needed and not isinstance(report, RunReport) else None),
                )
                for report, protocol in zip(reports, protocols, strict=True)
            )
            found.append(_values(f"protocol.{key}", stated))
    return [text for text in found if text]


def _values(field: str, stated: Iterable[tuple[Measured, Any]]) -> str:
    """The values of a field and who has them, where there is more than one; None is not a value."""
    by_value: dict[str, str] = {}
    for report, value in stated:
        if value is not None:
            by_value.setdefault(str(value), report.name)
    if len(by_value) < 2:
        return ""
    return f"{field} differs: " + ", ".join(f"{_short(value)} ({name})" for value, name in by_value.items())


def _short(value: str) -> str:
    """Hashes by their first digits."""
    return f"{value[:16]}..." if re.fullmatch("[0-9a-f]{64}", value) else value
