"""A workflow for ComfyUI that draws with the student: its sampler, its very noise levels, no guidance.

The file is in ComfyUI's API format (docs.comfy.org, "Workflow API Format"): nodes by number, each with its class and
its inputs, a value or [node, output]. ``NODES`` has what its documentation of built-in nodes says of those that are
used. Text encoders and VAE are those of the teacher's own files there; the titles say which file of the student goes
where. It was compared with that documentation, and never run by ComfyUI itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.path import Path as NoisePath
from stepdistill.errors import UserError
from stepdistill.networks.sampler import Sampler

COMFYUI = "comfyui.json"
Node = dict[str, Any]
Link = list[Any]

NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": "STRING"}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name": "STRING", "weight_dtype": "STRING"}, ("MODEL",)),
    "DualCLIPLoader": ({"clip_name1": "STRING", "clip_name2": "STRING", "type": "STRING"}, ("CLIP",)),
    "TripleCLIPLoader": ({f"clip_name{i}": "STRING" for i in (1, 2, 3)}, ("CLIP",)),
    "VAELoader": ({"vae_name": "STRING"}, ("VAE",)),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": "STRING", "strength_model": "FLOAT"},
        ("MODEL",),
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": "STRING", "zsnr": "BOOLEAN"}, ("MODEL",)),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "KSamplerSelect": ({"sampler_name": "STRING"}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": "STRING"}, ("SIGMAS",)),
    "SamplerCustom": (
        {"model": "MODEL", "add_noise": "BOOLEAN", "noise_seed": "INT", "cfg": "FLOAT", "positive": "CONDITIONING",
         "negative": "CONDITIONING", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}  # fmt: skip
"""Inputs and outputs of ComfyUI's nodes by class."""

TYPES: dict[str, type | tuple[type, ...]] = {
    "STRING": str,
    "INT": int,
    "FLOAT": (int, float),
    "BOOLEAN": bool,
}
KINDS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""diffusers' prediction_type -> what ModelSamplingDiscrete calls it."""
PUBLISHED: dict[str, dict[str, list[Any]]] = {
    "StableDiffusionPipeline": {"block_out_channels": [[320, 640, 1280, 1280]], "cross_attention_dim": [768, 1024]},
    "StableDiffusionXLPipeline": {"block_out_channels": [[320, 640, 1280]], "cross_attention_dim": [2048]},
    "StableDiffusion3Pipeline": {"joint_attention_dim": [4096], "attention_head_dim": [64]},
    "FluxPipeline": {"joint_attention_dim": [4096], "attention_head_dim": [128]},
}  # fmt: skip
"""Pipelines for which workflows are written, and what the networks that ComfyUI knows have in common."""


@dataclass(frozen=True)
class StudentFile:
    """The file that ComfyUI loads.

    Attributes:
        file: in the student's folder.
        strength: at which the adapter goes on the teacher's network; None for a whole network.
    """

    file: str
    strength: float | None


def check_comfyui(pipeline: str, config: Mapping[str, Any]) -> str | None:
    """Why ComfyUI would not know a student's network, as the end of a sentence; None where it does.

    Args:
        pipeline: class of the teacher's.
        config: of its network.
    """
    if pipeline not in PUBLISHED:
        return f"workflows are written for {', '.join(PUBLISHED)}, and this is a {pipeline}"
    for key, known in PUBLISHED[pipeline].items():
        value = config.get(key)
        if (list(value) if isinstance(value, tuple) else value) not in known:
            return f"ComfyUI knows networks of the published sizes, and this one's {key} is {value}"
    return None


def sigmas_of(path: NoisePath, times: tuple[float, ...]) -> list[float]:
    """The noise levels of a student's calls as ComfyUI counts them, and the 0 at the end.

    On a table of alphas that is sigma / alpha, on a flow path t itself.

    Raises:
        UserError: it starts below pure noise, or there the table has no signal at all.
    """
    if times[0] < 1 - 1.5e-3:
        raise UserError("the student starts below pure noise, which ComfyUI's noise levels cannot say")
    if isinstance(path, FlowPath):
        return [*times, 0.0]
    if not isinstance(path, TablePath):
        raise UserError(f"ComfyUI has no noise levels of a {type(path).__name__}")
    t = torch.tensor(times)
    alpha, sigma = path.alpha_sigma(t.double())
    if not float(alpha.min()) > 1e-3:
        raise UserError("the noise levels of the student's table have no end (zero terminal SNR)")
    return [*(sigma / alpha).tolist(), 0.0]


def workflow(
    *,
    pipeline: str,
    student: StudentFile,
    teacher: str,
    sampler: Sampler,
    path: NoisePath,
    prediction_type: str,
    prompt: str,
    width: int,
    height: int,
    guidance: float | None = None,
) -> dict[str, Node]:
    """The nodes of a workflow that draws one picture.

    Args:
        pipeline: class of the teacher's.
        student: its file.
        teacher: the teacher's name; its files are asked for under it.
        sampler: how the student draws.
        path: the student's.
        prediction_type: of its scheduler.
        prompt: the first to draw.
        width, height: in pixels.
        guidance: the scale that the student's network takes as an input; None where it takes none.

    Raises:
        UserError: ComfyUI cannot draw so.
    """
    flow = isinstance(path, FlowPath)
    if sampler.gamma:
        raise UserError(
            f"the student draws with TCD's gamma {sampler.gamma:g}, which ComfyUI's samplers have not"
        )
    if guidance is not None and pipeline != "FluxPipeline":
        raise UserError("the student takes guidance as an input, which ComfyUI's nodes for it have not")
    nodes: dict[str, Node] = {}

    def add(kind: str, inputs: dict[str, Any], title: str = "") -> str:
        number = str(len(nodes) + 1)
        nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return number

    model, clip, vae = _teacher_parts(add, pipeline, teacher, student.strength is None)
    if student.strength is None:
        name = "student.safetensors"
        title = f"copy {student.file} to models/diffusion_models/{name}"
        model = [add("UNETLoader", {"unet_name": name, "weight_dtype": "default"}, title), 0]
    else:
        name = "student_lora.safetensors"
        given = {"model": model, "lora_name": name, "strength_model": student.strength}
        model = [add("LoraLoaderModelOnly", given, f"copy {student.file} to models/loras/{name}"), 0]
    if not flow and prediction_type != "epsilon":
        given = {"model": model, "sampling": KINDS[prediction_type], "zsnr": False}
        model = [add("ModelSamplingDiscrete", given, "what the student's network predicts"), 0]
    positive = [add("CLIPTextEncode", {"text": prompt, "clip": clip}, "prompt"), 0]
    if guidance is not None:
        positive = [add("FluxGuidance", {"conditioning": positive, "guidance": guidance}), 0]
    empty = "EmptySD3LatentImage" if flow else "EmptyLatentImage"
    levels = ", ".join(f"{value:.7g}" for value in sigmas_of(path, sampler.times))
    drawn = add(
        "SamplerCustom",
        {
            "model": model,
            "add_noise": True,
            "noise_seed": 0,
            "cfg": 1.0,
            "positive": positive,
            "negative": [add("CLIPTextEncode", {"text": "", "clip": clip}, "not used at cfg 1"), 0],
            "sampler": [add("KSamplerSelect", {"sampler_name": _sampler(sampler)}), 0],
            "sigmas": [add("ManualSigmas", {"sigmas": levels}, f"the student's {sampler.steps} step(s)"), 0],
            "latent_image": [add(empty, {"width": width, "height": height, "batch_size": 1}), 0],
        },
        "cfg stays 1: guidance is in the student",
    )
    decoded = add("VAEDecode", {"samples": [drawn, 0], "vae": vae})
    add("SaveImage", {"images": [decoded, 0], "filename_prefix": "stepdistill"})
    check_workflow(nodes)
    return nodes


def _sampler(sampler: Sampler) -> str:
    """Fresh noise between steps is ComfyUI's ``lcm``; a step along the predicted noise (DDIM, Euler) is ``euler``."""
    return "lcm" if sampler.renoise and sampler.steps > 1 and sampler.gamma is None else "euler"


def _teacher_parts(add: Any, pipeline: str, teacher: str, whole: bool) -> tuple[Link, Link, Link]:
    """The teacher's network, text encoders and VAE."""
    if pipeline == "FluxPipeline":
        model: Link = []
        if not whole:
            given = {"unet_name": f"{teacher}.safetensors", "weight_dtype": "default"}
            model = [add("UNETLoader", given, "the teacher, in models/diffusion_models"), 0]
        names = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"}
        vae = add("VAELoader", {"vae_name": "ae.safetensors"}, "the teacher's, in models/vae")
        return model, [add("DualCLIPLoader", names, "in models/text_encoders"), 0], [vae, 0]
    loaded = add(
        "CheckpointLoaderSimple",
        {"ckpt_name": f"{teacher}.safetensors"},
        "the teacher, in models/checkpoints",
    )
    clip: Link = [loaded, 1]
    if pipeline == "StableDiffusion3Pipeline":  # its published files hold no text encoders
        files = ("clip_l", "clip_g", "t5xxl_fp16")
        names = {f"clip_name{i}": f"{file}.safetensors" for i, file in enumerate(files, 1)}
        clip = [add("TripleCLIPLoader", names, "in models/text_encoders"), 0]
    return [loaded, 0], clip, [loaded, 2]


def check_workflow(nodes: Mapping[str, Node]) -> None:
    """Every node is one of ``NODES``, with all its inputs and no other, each of the kind that it takes.

    Raises:
        ValueError: one is not.
    """
    for number, node in nodes.items():
        inputs, _ = NODES[node["class_type"]]
        if node["inputs"].keys() != inputs.keys():
            raise ValueError(f"node {number}, {node['class_type']}, has inputs {sorted(node['inputs'])}")
        for name, value in node["inputs"].items():
            wanted = inputs[name]
            if isinstance(value, list):
                origin, output = value
                found = NODES[nodes[origin]["class_type"]][1][output]
            else:
                fits = isinstance(value, TYPES[wanted]) and isinstance(value, bool) == (wanted == "BOOLEAN")
                found = wanted if fits else type(value).__name__
            if found != wanted:
                raise ValueError(
                    f"node {number}, {node['class_type']}: {name} is {found}, and takes {wanted}"
                )


def write_workflow(folder: Path, nodes: Mapping[str, Node]) -> None:
    """Writes the workflow into a student's folder."""
    (folder / COMFYUI).write_text(json.dumps(nodes, indent=1) + "\n", encoding="utf-8")
