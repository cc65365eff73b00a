"""Makes a small text-to-image teacher of emoji: ``python train/make_teacher.py --output FOLDER``.

Tokenizer, autoencoder, CLIP and denoiser are trained one after the other; the same command continues a run
that was stopped. The teacher is FOLDER/teacher (FOLDER/teacher-flow for ``--pipeline sd3``), a folder that
plain diffusers loads; FOLDER/features is the feature network of the evaluation.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.system.emoji import embedded_teachers
from stepdistill.teacher_training.settings import PRESETS, TeacherSettings

STAGES = ("vae", "clip", "unet", "flow", "judge")
TIMES = """\
time and sizes:
  small  a UNet of 2.5 M parameters, the size of the first embedded teacher. 50 minutes on one idle CPU
         core (VAE 16, CLIP 10, UNet 20, the rest 1 to 2), less on two; the flow stage of --pipeline sd3
         takes 95 instead of the UNet's 20. The judge takes 15.
  base   wider networks and four times the steps. For a GPU; on a CPU it takes most of a day.
  tiny   24 images and a few steps, under a minute on one core, to see what the folder looks like.
         It draws blots.
A progress bar for each stage shows the rate and the time left. Weights are saved every
--checkpoint-every steps: stop the command at any time and give it again to go on. Settings that decide
the weights cannot be changed on the way.
On a CPU the weights depend on the settings, the library versions and the number of threads alone, and
not on whether the run was stopped. A GPU trains in bfloat16 and may add in another order each time."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="make_teacher.py",
        description="Make a text-to-image teacher of 32x32 emoji. The same command continues a run.",
        epilog=TIMES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new, or of the same settings"
    )
    made.add_argument("--size", choices=sorted(PRESETS), default="small", help="preset of widths and steps")
    made.add_argument(
        "--pipeline",
        choices=("sd", "sd3"),
        default="sd",
        help="sd: StableDiffusionPipeline, predicts noise (default); sd3: StableDiffusion3Pipeline, flow. "
        "Both may be made in one folder and then share the VAE and CLIP",
    )
    made.add_argument(
        "--parts",
        metavar="NAME",
        help="take tokenizer, VAE and CLIP of this embedded teacher instead of training them",
    )
    made.add_argument(
        "--judge",
        action="store_true",
        help="make the judge of the evaluation instead of a teacher: FOLDER/judge, from the images alone",
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--seed", type=int, default=0)
    for stage in STAGES:
        made.add_argument(f"--{stage}-steps", type=int, metavar="N", help=f"steps of the {stage} stage")
    made.add_argument("--batch", type=int, metavar="N", help="images a step, in every stage")
    made.add_argument(
        "--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (default 200)"
    )
    return made


def settings_from(args: argparse.Namespace) -> TeacherSettings:
    """The preset with the command line's changes.

    Raises:
        UserError: a count is below 1, or no teacher of that name is embedded.
    """
    if args.parts is not None and args.parts not in embedded_teachers():
        raise UserError(f"--parts {args.parts}: embedded are {', '.join(embedded_teachers())}")
    settings = replace(PRESETS[args.size], seed=args.seed, parts=args.parts)
    for stage in STAGES:
        settings = settings.with_stage(stage, steps=getattr(args, f"{stage}_steps"), batch=args.batch)
    if args.checkpoint_every is not None:
        if args.checkpoint_every < 1:
            raise UserError(f"--checkpoint-every is at least 1, found {args.checkpoint_every}")
        settings = replace(settings, checkpoint_every=args.checkpoint_every)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 2 for a mistake of the user's, told in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    try:
        settings = settings_from(args)
        # Loading torch and diffusers takes seconds: not before the arguments are known to be good.
        from stepdistill.teacher_training.make import make_judge, make_teacher

        command = shlex.join(["python", "train/make_teacher.py", *arguments])
        if args.judge:
            made = make_judge(settings, args.output, device=args.device, command=command)
        else:
            made = make_teacher(
                settings, args.output, pipeline=args.pipeline, device=args.device, command=command
            )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; give the same command again to go on from the last checkpoint\n")
        return 130
    sys.stdout.write(f"{made}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
