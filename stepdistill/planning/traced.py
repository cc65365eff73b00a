"""What a trace of a recipe saw: memory, operations and sizes of its updates."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepdistill.families.size import Size
from stepdistill.planning.live_bytes import Peak


@dataclass
class Update:
    """An update of one network.

    Attributes:
        network: what is trained.
        share: of all updates of the run.
        peak: the most that is held in it.
        flops: operations of it.
        passes: forward passes of a sample, by who is called; those with a graph after a star.
    """

    network: str
    share: float
    peak: Peak
    flops: float
    passes: dict[str, float]


@dataclass
class Trace:
    """What was seen.

    Attributes:
        setup: the most that is held until training starts.
        held: what is held between two updates, by kind.
        picture: the most that is held between two updates while a picture is decoded; None where that cannot be known.
        updates: of each network.
        parameters: of each role, and ``trained`` of each.
        student, checkpoint: bytes of the student's network in float32, and of a checkpoint.
        exported: bytes of its networks in float32 in the host's memory, as it is exported.
        condition, state: bytes of a prompt's conditions, and of a state in float32.
        components: bytes of the pipeline's other networks.
        pair_states: states that are kept with each pair.
        needs: what the method asks of the data.
        teacher_call: operations of a call of the teacher for one sample, guided as pairs are.
        fine_tune: the most that is held in an ordinary update of one adapter of the same network; 0 for full weights.
        notes: what was left out.
        source: where the configs are from.
        size, step_counts: what is drawn, and the student's numbers of steps.
    """

    setup: Peak
    held: dict[str, int]
    picture: Peak | None
    updates: list[Update]
    parameters: dict[str, int]
    trained: dict[str, int]
    student: int
    exported: int
    checkpoint: int
    condition: int
    state: int
    components: int
    pair_states: int
    needs: frozenset[str]
    source: str
    size: Size
    step_counts: tuple[int, ...]
    teacher_call: float
    fine_tune: int = 0
    notes: list[str] = field(default_factory=list)
