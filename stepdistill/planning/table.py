"""A plan as text."""

from __future__ import annotations

from stepdistill.planning.live_bytes import OTHER
from stepdistill.planning.plan import MFU, Plan


def table(found: Plan) -> str:
    """What is planned, line by line."""
    seen, said = found.trace, found.recipe
    kind = f"LoRA of rank {said['lora_rank']}" if said["lora_rank"] else "all weights"
    shared = f", {found.gpus} GPUs" if found.gpus > 1 else ""
    lines = [
        f"{said['method']} of {said['teacher']} ({seen.source}), {said['size']}, {kind}",
        f"batch {said['batch']}{shared}, accumulate {said['accumulate']}, {said['precision']}, weights "
        f"{said['weights']}, {said['optimizer']}, checkpointing {'on' if said['checkpointing'] else 'off'}",
        "",
        f"{'millions of parameters':<26}{'in all':>10}{'trained':>10}",
    ]
    for name, count in seen.parameters.items():
        lines.append(f"{name:<26}{count / 1e6:>10,.1f}{seen.trained.get(name, 0) / 1e6:>10,.1f}")
    columns = {"setup": seen.setup} | {f"{each.network}'s update": each.peak for each in seen.updates}
    if seen.picture is not None:
        columns["a picture"] = seen.picture
    kinds = sorted({kind for peak in columns.values() for kind in peak.by_kind} - {OTHER})
    lines += ["", f"{'GiB on a GPU, at the peak':<26}" + "".join(f"{name:>18}" for name in columns)]
    for each in [*kinds, OTHER]:
        sizes = [peak.by_kind.get(each, 0) for peak in columns.values()]
        label = "activations, loading" if each == OTHER else each
        lines.append(f"{label:<26}" + "".join(f"{size / 2**30:>18,.2f}" for size in sizes))
    totals = "".join(f"{peak.total / 2**30:>18,.2f}" for peak in columns.values())
    lines += [f"{'in all':<26}{totals}", ""]
    if found.ratio:
        lines.append(
            f"an ordinary update of one such LoRA: {seen.fine_tune / 2**30:.2f} GiB; ratio {found.ratio:.2f}"
        )
    for update in seen.updates:
        calls = ", ".join(
            f"{name.removesuffix('*')} {count:g}{' with its backward pass' if name.endswith('*') else ''}"
            for name, count in update.passes.items()
        )
        lines.append(
            f"{update.network}'s update, {update.share:.0%} of all: {update.flops / 1e12:,.2f} TFLOP a GPU; passes "
            f"of a sample: {calls}"
        )
    lines += times(found)
    disk = ", ".join(f"{name} {size / 2**30:,.2f} GiB" for name, size in found.disk.items())
    host = f"host memory: {seen.exported / 2**30:,.2f} GiB, of the student's networks in float32 while it is exported"
    lines += [f"disk: {disk}", host, *(f"note: {note}" for note in seen.notes)]
    return "\n".join([*lines, *verdict(found)])


def times(found: Plan) -> list[str]:
    """Hours of the updates, of the pairs before them, and of the teacher's pictures that the student is set beside."""
    told = {f"{found.recipe['updates']:,} updates": found.hours}
    if found.pairs:
        told = {f"{found.pairs:,} pairs of the teacher, unless they are there": found.pair_hours} | told
    if found.pictures:
        told[f"{found.pictures:,} pictures of the teacher to measure by, unless they are there"] = (
            found.picture_hours
        )
    return [
        f"{what}, if a GPU reaches {MFU:.0%} of its peak (assumed): "
        + ", ".join(f"{name} {duration(value)}" for name, value in hours.items())
        for what, hours in told.items()
    ]


def duration(hours: float) -> str:
    """Hours as a text of two digits or more, in the unit in which that is read."""
    for unit, parts in (("h", 1), ("min", 60)):
        if hours * parts >= 1:
            return f"{hours * parts:,.1f} {unit}"
    return f"{hours * 3600:.2g} s"


def verdict(found: Plan) -> list[str]:
    """Whether it fits, and what would."""
    if found.fits is None:
        return []
    need, have = f"{found.peak / 2**30:.1f} GiB and 1 GiB for CUDA itself", f"{found.memory / 2**30:.1f} GiB"
    if found.fits:
        return [f"fits: {need}, of {have}"]
    lines = [f"warning: does not fit: {need}, of {have}"]
    if found.change:
        lines.append(f"one change that fits: {found.change.text} ({found.change.peak / 2**30:.1f} GiB)")
    else:
        lines.append(f"no single change fits; tried: {'; '.join(found.tried) or 'none is left'}")
    return lines
