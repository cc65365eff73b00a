"""What a verb says of itself: three examples under its help, and one line for a wrong option, argument or verb."""

from __future__ import annotations

import difflib
from typing import Any

EXAMPLES = {
    "ls": ("ls recipes", "ls methods", "ls keys lcm"),
    "cp": ("cp lcm_emoji my.yaml", "cp lcm_lora_sdxl my.yaml --full", "cp dmd_emoji recipes/"),
    "plan": (
        "plan lcm_lora_sdxl --memory 24GB",
        "plan --teacher my_pipeline --method dmd --device cpu",
        "plan dmd2_sdxl_4step --gpus 8 --gpu h100 --json",
    ),
    "train": (
        "train --method lcm",
        "train lcm_lora_sdxl --teacher my_sdxl --prompts prompts.txt --steps 4 --lora 64",
        "train my.yaml --updates 2000 --set train.lr=1e-4 --dry-run",
    ),
    "watch": ("watch", "watch runs/latest", "watch runs/lcm_emoji"),
    "sample": (
        'sample runs/latest "red apple" "a dog"',
        'sample runs/latest --prompt "red apple" --seed 7 --output apple.png',
        "sample runs/latest --prompts prompts.txt --into pictures --teacher",
    ),
    "eval": (
        "eval runs/latest --suite emoji",
        "eval emoji --suite emoji-quick --steps 4 --guidance 2.5",
        "eval my_pictures --suite my_suite.yaml",
    ),
    "geneval": (
        "geneval runs/latest --prompts evaluation_metadata.jsonl --output geneval",
        "geneval my_sdxl --prompts evaluation_metadata.jsonl --output teacher --steps 25 --guidance 5",
        "geneval runs/latest --prompts evaluation_metadata.jsonl --output geneval --samples 4",
    ),
    "stats": (
        "stats my_pictures --output my_pictures.safetensors",
        "stats shards.tar --output reference.safetensors",
        "stats my_pictures --features clip:clip-vit-large --output clip.safetensors",
    ),
    "compare": (
        "compare runs/lcm_emoji runs/dmd_emoji",
        "compare --methods lcm,dmd,tcd --budget 10m",
        "compare --methods lcm,my.yaml --seeds 0,1,2 --output runs/compared",
    ),
    "hybrid": (
        "hybrid emoji runs/dmd_emoji_4step --output hybrid",
        "hybrid emoji runs/dmd_emoji_4step --teacher-grid 8 --output hybrid",
        "hybrid my_sdxl runs/latest --teacher-calls 1 --guidance 7 --output my_hybrid",
    ),
    "partition": (
        "partition --output parts.txt",
        "partition --parts 8 --output parts.txt",
        "partition --teacher my_sdxl --prompts prompts.txt --output parts.txt",
    ),
    "join": (
        "join runs/part1 runs/part2 runs/part3 runs/part4 --output joined",
        "join runs/one/student runs/two/student --output joined",
        "join runs/half1 runs/half2 --output my_student",
    ),
    "trace": (
        'trace emoji runs/dmd_emoji_4step hybrid --prompt "red apple"',
        'trace runs/latest --prompt "a dog" --prompt "a cat" --seeds 16 --output traced',
        'trace my_sdxl runs/latest --steps 25 --guidance 7 --prompt "a castle"',
    ),
    "export": (
        "export runs/latest",
        "export runs/latest --what adapter --kohya --output my_lora",
        "export runs/latest --add-lora my_slider.safetensors --scale 0.8 --output my_student",
    ),
    "verify": ("verify runs/latest", "verify runs/lcm_emoji/student", "verify my_student"),
    "push": (
        "push runs/latest --repo me/my-student",
        "push runs/latest --repo me/my-lora --what adapter --base-model me/my-sdxl",
        "push runs/latest --repo me/my-student --dry-run",
    ),
    "demo": (
        "demo runs/latest",
        "demo runs/lcm_emoji runs/dmd_emoji --teacher emoji",
        'demo runs/latest --prompt "red apple" --port 8000',
    ),
    "doctor": ("doctor", "doctor --teacher my_sdxl", "doctor runs/latest"),
}
"""Three commands of each verb."""

ELSEWHERE = {
    **{"list": "ls", "copy": "cp", "distill": "train", "distil": "train", "fit": "train", "run": "train"},
    **{"draw": "sample", "generate": "sample", "infer": "sample", "evaluate": "eval", "test": "eval"},
    **{"check": "verify", "rank": "compare", "convert": "export", "tail": "watch", "status": "watch"},
    **{"upload": "push", "publish": "push", "share": "push", "serve": "demo", "gradio": "demo"},
}
"""What other tools call a verb."""


def epilog(verb: str) -> str:
    """A verb's examples, as its help ends."""
    return "\n".join(["\b", "Examples:", *(f"  stepdistill {line}" for line in EXAMPLES[verb])])


def in_one_line(error: Any) -> str | None:
    """What a usage error of typer comes to; None where it is the help that was asked for by giving nothing.

    Args:
        error: a UsageError.
    """
    kind, context = type(error).__name__, error.ctx
    if kind == "NoArgsIsHelpError":
        return None
    path = context.command_path if context else "stepdistill"
    if kind == "NoSuchOption":
        said = _no_such_option(error.option_name, context)
    elif "No such command" in (text := error.format_message()):
        said = _no_such_verb(text.split("'")[1], list(context.command.commands))
    else:
        said = text[:1].lower() + text[1:].replace("Value error, ", "").rstrip(".")
    verb = f"{context.info_name}: " if context and context.parent else ""
    return f"{verb}{said}; `{path} --help` says more"


def _no_such_verb(name: str, verbs: list[str]) -> str:
    near = ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, verbs, n=1)), None)
    hint = f" (did you mean {near}?)" if near else ""
    return f"there is no verb {name}{hint}: there are {', '.join(verbs)}"


def _no_such_option(name: str, context: Any) -> str:
    known = [flag for parameter in context.command.params for flag in parameter.opts if flag[:2] == "--"]
    if context.info_name in ("train", "plan") and (key := _key_of(name.lstrip("-").replace("-", "_"))):
        flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        short = {"lora_rank": "lora", "times": "steps"}.get(key.rpartition(".")[2], key.rpartition(".")[2])
        instead = f"{flags[short]} VALUE" if short in flags else f"--set {key}=VALUE"
        return f"there is no option {name}: give {instead}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else f": there are {', '.join(known)}"
    return f"there is no option {name}{hint}"


def _key_of(name: str) -> str | None:
    """The key of a recipe that an option of another trainer, or a key's last part, stands for."""
    from stepdistill.recipes.reference import recipe_keys
    from stepdistill.recipes.renamed import ELSEWHERE as KEYS

    if name in KEYS:
        return KEYS[name].partition("=")[0]
    found = [key.path for key in recipe_keys() if key.path.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None
