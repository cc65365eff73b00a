"""Peak memory of evaluating few and many images of one pipeline: flat, as rows lie in shards on disk.

python eval/bench/memory.py STUDENT                     # 2,000 and 10,000 images
python eval/bench/memory.py STUDENT --n 200 1000

Each number of images is evaluated by ``stepdistill eval`` in a process of its own: drawn, measured and reported. The
resident peak is that of the whole process; ``idle`` is a process that does the same with 3 images, so what libraries,
networks and the reference take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, resource, sys
from stepdistill.cli import main
try:
    main()
finally:
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss), file=sys.stderr)
"""


def peak(
    pipeline: str, suite: str, n: int, steps: int, batch: int, folder: Path
) -> tuple[float, float, float]:
    """Peak in MiB, seconds of the whole command, and its Frechet distance."""
    output = folder / str(n)
    command = [
        sys.executable,
        "-c",
        CHILD,
        "eval",
        pipeline,
        "--suite",
        suite,
        "--n",
        str(n),
        "--steps",
        str(steps),
    ]
    command += ["--batch", str(batch), "--output", str(output)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    kib = int(done.stderr.strip().splitlines()[-1]) / (1024 if sys.platform == "darwin" else 1)
    report = json.loads((output / "report.json").read_text("utf-8"))
    return kib / 1024, seconds, report["scores"][str(steps)]["fd"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pipeline", help="student folder, diffusers folder or the name of an embedded teacher"
    )
    parser.add_argument("--n", type=int, nargs="+", default=[2000, 10000])
    parser.add_argument("--suite", default="emoji")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.steps, options.batch, Path(folder))
        idle, _, _ = peak(options.pipeline, options.suite, 3, *arguments)
        print(f"{'images':>8}  {'peak, MiB':>10}  {'seconds':>8}  {'FD':>8}")
        print(f"{'idle':>8}  {idle:>10.0f}")
        peaks = []
        for n in options.n:
            found, seconds, distance = peak(options.pipeline, options.suite, n, *arguments)
            peaks.append(found)
            print(f"{n:>8}  {found:>10.0f}  {seconds:>8.1f}  {distance:>8.3f}")
    print(f"peak of {options.n[-1]} over peak of {options.n[0]}: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
