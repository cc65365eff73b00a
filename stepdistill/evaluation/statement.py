"""What a report states of an evaluation besides its numbers: names, protocol, warnings, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.measure import ERRORS, too_few_for
from stepdistill.evaluation.scores import Report, Scores
from stepdistill.evaluation.suite_identity import protocol_of
from stepdistill.features.judge import Judge
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.sample_size import too_few
from stepdistill.metrics.sfid import DIMENSION
from stepdistill.pages.metric_names import conflict_sentence
from stepdistill.system.log import say


def statement(
    extraction: Extraction,
    scores: Scores,
    protocol: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields ``metrics``, ``better``, ``protocol``, ``warnings`` and ``not_computed`` of a Report.

    Args:
        extraction: the suite's networks.
        scores: those of any step count: all have the same metrics and number of images.
        protocol: what else it states, of how the images were drawn.
        remarks: warnings of the drawing.
    """
    suite = extraction.suite
    left_out = {**too_few_for(suite, scores.n), **extraction.not_computed, **scores.own_missing}
    if suite.neighbours and scores.recall is None and "recall" not in left_out:
        why = "the reference holds no features; remake it with stepdistill stats"
        left_out |= dict.fromkeys(("precision", "recall", "density", "coverage"), why)
    return {
        "metrics": metric_names(extraction),
        "better": {metric.name: metric.better for metric in suite.own_metrics()},
        "protocol": {
            **protocol_of(suite, extraction.network),
            "standard_errors": ERRORS,
            **(protocol or {}),
        },
        "warnings": (*remarks, *warnings(extraction, scores)),
        "not_computed": left_out,
    }


def tell(report: Report) -> None:
    """One line on stderr for every warning, for every reason why metrics were left out, and for conflicts."""
    for text in report.warnings:
        say(text)
    for why in dict.fromkeys(report.not_computed.values()):
        left_out = [name for name, reason in report.not_computed.items() if reason == why]
        say(f"not computed: {', '.join(left_out)}: {why}")
    if report.conflicts:
        say(conflict_sentence(report.conflicts, report.metrics))


def metric_names(extraction: Extraction) -> dict[str, str | None]:
    """What the scores are called: always ``fd`` and ``clip_score`` (None where there is none), and those metrics that
    not every suite has."""
    suite, network = extraction.suite, extraction.network
    clip = extraction.network_of("clip_score")
    names: dict[str, str | None] = {
        "fd": network.fd_name if network else None,
        "clip_score": clip.clip_name if clip else None,
    }
    forms = {
        "fid_infinity": r"\g<0>-infinity",
        "sfid": "sFID",
        "inception_score": "Inception score",
        "cmmd": "CMMD",
        "pick_score": "PickScore",
        "aesthetic": "aesthetic score",
    }
    for metric, form in forms.items():
        own: FeatureNetwork | None = extraction.network_of(metric)
        if own is not None:
            names[metric] = re.sub("^(FID|FD(-Inception|-CLIP|-DINOv2)?)", form, own.fd_name)
    if (second := extraction.network_of("second_fd")) is not None:
        names["second_fd"] = second.fd_name
    if (second := extraction.network_of("second_fit")) is not None:
        names["second_fit"] = second.fit_name if isinstance(second, Judge) else second.clip_name
    if "aesthetic" in names:
        names["aesthetic"] = f"aesthetic score ({suite.aesthetic_file().name})"
    return names | {metric.name: metric.name.replace("_", " ") for metric in suite.own_metrics()}


_SIZED_AS = {"recall": "neighbours", "second_fd": "fd"}
"""Metrics that need as many images as another."""


def warnings(extraction: Extraction, scores: Scores) -> tuple[str, ...]:
    """Why there are too few images for a metric, for every metric that was computed."""
    found: list[str | None] = []
    if extraction.network is not None:
        dimension = extraction.network.dimension
        sizes = {"fd": dimension, "fid_infinity": dimension, "sfid": DIMENSION, "inception_score": dimension}
        sizes |= {"kid": dimension, "recall": dimension}
    else:
        sizes = {}
    if extraction.second is not None:
        sizes["second_fd"] = extraction.second.dimension
    if (embedding := extraction.network_of("cmmd")) is not None:
        sizes["cmmd"] = embedding.dimension
    values: dict[str, float | None] = {
        "fd": scores.fd,
        "fid_infinity": scores.fid_infinity,
        "sfid": scores.sfid,
        "inception_score": scores.inception_score,
        "kid": scores.kid,
        "recall": scores.recall,
        "cmmd": scores.cmmd,
        "second_fd": scores.second_fd,
    }
    for metric, size in sizes.items():
        if values[metric] is not None:
            found.append(too_few(_SIZED_AS.get(metric, metric), scores.n, size))
    return tuple(dict.fromkeys(text for text in found if text is not None))
