"""Changes the package's code, one small change at a time, and prints the changes that no test notices.

    python tests/mutants.py                                   # every file of GUARDS
    python tests/mutants.py stepdistill/methods/dmd.py        # one file
    python tests/mutants.py stepdistill/methods/dmd.py --lines 70-90
    python tests/mutants.py --jobs 2                          # two files at a time

The tests that guard a file are collected once; for each change (a mutant) they run in a fork of that process, those
that killed a mutant before and the quick ones first, with the changed code grafted into the functions in use. A mutant
is killed when a test fails or three times the tests' own processor time runs out; the command fails when one survives
that EXCEPTIONS does not explain. Left as they are: defaults of options, which a test would only say twice, the default
times, which tests/methods/test_contract.py has for all methods, floors of 1e-4 and less, the strictness of zip, whether
a continuous draw may meet its bound, and how large a block is that is computed at once. Trainings (LONG)
are left out: they take long to notice little.

Why not a library: mutmut 3 changes nothing in decorated functions or class bodies (properties, class methods,
``@torch.no_grad()``), has no mutants that drop a term, a statement or a stopped gradient, and takes no others;
cosmic-ray takes them as installed plugins, and starts a process for each mutant, most of which is the import of torch.
Here a mutant is a fork of one process that has imported torch and collected the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
OF_CONSISTENCY, OF_FLOWS = "tests/methods/test_options_consistency.py", "tests/methods/test_options_flow.py"
OF_POLICY = "tests/methods/test_options_onpolicy.py"
SHARED = ["tests/losses/test_fake_score.py", "tests/methods/test_options_matching.py"]
OF_METRICS = [
    "tests/metrics/test_metrics.py",
    "tests/metrics/test_fid_metrics.py",
    "tests/evaluation/test_paired.py",
]
OF_FAMILIES = ["tests/networks/test_codec.py", "tests/families/test_families.py"]
DECLARED = [
    f"tests/methods/test_contract.py::test_{name}"
    for name in (
        "what_makes_no_call_of_a_drawing_follows_the_student",
        "the_watch_holds_no_student_to_its_teacher_that_is_led_elsewhere",
        "methods_that_match_distributions_start_below_pure_noise",
    )
]
"""What methods say of themselves: tests beside those of each."""

GUARDS: dict[str, list[str]] = {
    "stepdistill/losses/fake_score.py": [
        *SHARED,
        "tests/methods/test_dmd.py",
        "tests/methods/test_diff_instruct.py",
        "tests/methods/test_phased_dmd.py",
        "tests/diffusion/test_shift.py",
    ],
    "stepdistill/losses/gan.py": [
        "tests/losses/test_discriminator.py",
        "tests/methods/test_options_matching.py",
        "tests/methods/test_pcm.py",
        "tests/diffusion/test_shift.py",
    ],
    "stepdistill/losses/distances.py": ["tests/losses/test_distances.py"],
    "stepdistill/losses/adversarial.py": [
        "tests/methods/test_gdd.py",
        "tests/methods/test_ladd.py",
        *DECLARED,
    ],
    "stepdistill/data/video_decoding.py": ["tests/data/test_training_videos.py"],
    "stepdistill/metrics/motion.py": ["tests/evaluation/test_against_teacher.py"],
    **{
        f"stepdistill/metrics/{name}.py": OF_METRICS
        for name in (
            *("clip_score", "cmmd", "diversity", "fid_infinity", "frechet", "frechet_interval"),
            *("inception_score", "intervals", "kid", "mmd", "pick_score", "prdc", "sample_size", "sfid"),
        )
    },
    "stepdistill/metrics/spectrum.py": ["tests/metrics/test_spectrum.py"],
    "stepdistill/metrics/colours.py": [
        "tests/training/test_rewards.py",
        "tests/evaluation/test_own_metric.py",
    ],
    "stepdistill/evaluation/paired.py": ["tests/evaluation/test_paired.py"],
    "stepdistill/comparison/ranking.py": [
        "tests/comparison/test_ranking.py",
        "tests/comparison/test_teachers.py",
        "tests/comparison/test_compare.py",
    ],
    "stepdistill/diffusion/path.py": ["tests/diffusion/test_path.py", "tests/diffusion/test_shift.py"],
    "stepdistill/diffusion/shift.py": ["tests/diffusion/test_shift.py"],
    "stepdistill/diffusion/solvers.py": ["tests/diffusion/test_path.py", "tests/diffusion/test_shift.py"],
    "stepdistill/diffusion/draws.py": ["tests/diffusion/test_draws.py"],
    "stepdistill/methods/gdd.py": ["tests/methods/test_gdd.py"],
    "stepdistill/methods/ladd.py": ["tests/methods/test_ladd.py"],
    "stepdistill/methods/uni_dad.py": ["tests/methods/test_uni_dad.py"],
    "stepdistill/losses/progressive.py": [
        "tests/methods/test_progressive.py",
        "tests/methods/test_lightning.py",
    ],
    "stepdistill/losses/jump_gan.py": ["tests/methods/test_lightning.py"],
    "stepdistill/methods/lightning.py": ["tests/methods/test_lightning.py"],
    "stepdistill/methods/progressive.py": ["tests/methods/test_progressive.py"],
    "stepdistill/losses/terms.py": ["tests/methods/test_options_matching.py", "tests/losses/test_terms.py"],
    "stepdistill/losses/objective.py": ["tests/losses/test_terms.py"],
    "stepdistill/losses/rewards.py": ["tests/losses/test_terms.py", "tests/losses/test_reward_term.py"],
    "stepdistill/losses/reward_term.py": ["tests/losses/test_reward_term.py"],
    "stepdistill/losses/reweighting.py": ["tests/losses/test_reweighting.py"],
    "stepdistill/methods/gndm.py": ["tests/methods/test_gndm.py"],
    "stepdistill/losses/latent_reward.py": ["tests/losses/test_reward_term.py"],
    "stepdistill/losses/regression.py": [
        *SHARED,
        "tests/methods/test_diff_instruct.py",
        "tests/losses/test_terms.py",
    ],
    "stepdistill/losses/decoupled_guidance.py": ["tests/methods/test_dmd.py"],
    "stepdistill/losses/first_step.py": ["tests/methods/test_dmd.py", "tests/diffusion/test_shift.py"],
    "stepdistill/losses/subinterval.py": [
        "tests/methods/test_phased_dmd.py",
        "tests/diffusion/test_shift.py",
    ],
    "stepdistill/networks/sampler.py": [
        "tests/networks/test_sampler.py",
        "tests/networks/test_second_time.py",
        "tests/methods/test_dmd.py",
        "tests/diffusion/test_shift.py",
    ],
    "stepdistill/export/schedulers.py": [
        "tests/export/test_schedulers.py",
        "tests/networks/test_sampler.py",
        "tests/diffusion/test_shift.py",
    ],
    "stepdistill/networks/derivative.py": ["tests/networks/test_derivative.py"],
    "stepdistill/networks/checkpointing.py": ["tests/networks/test_checkpointing.py"],
    "stepdistill/networks/lora.py": ["tests/networks/test_roles.py", "tests/training/test_adapters.py"],
    "stepdistill/networks/roles.py": ["tests/networks/test_roles.py", "tests/training/test_adapters.py"],
    "stepdistill/families/_packing.py": OF_FAMILIES,
    "stepdistill/families/flux.py": OF_FAMILIES,
    "stepdistill/families/wan.py": OF_FAMILIES,
    "stepdistill/methods/dmd.py": ["tests/methods/test_dmd.py", *SHARED],
    "stepdistill/methods/phased_dmd.py": ["tests/methods/test_phased_dmd.py", *SHARED],
    "stepdistill/methods/diff_instruct.py": ["tests/methods/test_diff_instruct.py", *SHARED],
    "stepdistill/methods/f_distill.py": ["tests/methods/test_f_distill.py", *SHARED],
    "stepdistill/methods/sid.py": ["tests/methods/test_sid_sim.py", *SHARED],
    "stepdistill/methods/sim.py": ["tests/methods/test_sid_sim.py", *SHARED],
    "stepdistill/methods/consistency.py": ["tests/methods/test_consistency.py", OF_CONSISTENCY],
    "stepdistill/methods/flow_map.py": ["tests/methods/test_flow_map.py", OF_FLOWS],
    "stepdistill/methods/freeflow.py": ["tests/methods/test_freeflow.py", OF_FLOWS],
    "stepdistill/methods/instaflow.py": ["tests/methods/test_reflow_family.py", OF_FLOWS],
    "stepdistill/methods/lcm.py": ["tests/methods/test_lcm.py", OF_CONSISTENCY],
    "stepdistill/methods/dmf.py": ["tests/methods/test_dmf.py", OF_FLOWS],
    "stepdistill/methods/meanflow.py": ["tests/methods/test_meanflow.py", OF_FLOWS],
    "stepdistill/methods/anyflow.py": ["tests/methods/test_anyflow.py", OF_FLOWS],
    "stepdistill/methods/ayf.py": ["tests/methods/test_ayf.py", OF_FLOWS],
    "stepdistill/methods/self_e.py": ["tests/methods/test_self_e.py", OF_FLOWS],
    "stepdistill/losses/rollout.py": ["tests/losses/test_rollout.py", "tests/methods/test_opd.py"],
    "stepdistill/methods/self_opd.py": ["tests/methods/test_self_opd.py", OF_POLICY],
    "stepdistill/methods/echo.py": ["tests/methods/test_echo.py", "tests/methods/test_options_further.py"],
    "stepdistill/losses/likeness.py": ["tests/methods/test_echo.py"],
    "stepdistill/losses/picture_gan.py": [
        "tests/methods/test_echo.py",
        "tests/methods/test_options_further.py",
    ],
    "stepdistill/networks/concept.py": ["tests/training/test_new_word.py"],
    "stepdistill/training/student_start.py": ["tests/training/test_student_start.py"],
    "stepdistill/methods/crd.py": ["tests/methods/test_crd.py", OF_POLICY],
    "stepdistill/methods/gndmr.py": ["tests/methods/test_gndmr.py", OF_POLICY],
    "stepdistill/losses/groups.py": [
        "tests/methods/test_gndm.py",
        "tests/methods/test_gndmr.py",
        "tests/methods/test_crd.py",
    ],
    "stepdistill/methods/internalise.py": ["tests/methods/test_internalise.py", OF_POLICY],
    "stepdistill/methods/opd.py": ["tests/methods/test_opd.py", OF_POLICY],
    "stepdistill/methods/twinflow.py": ["tests/methods/test_twinflow.py", OF_FLOWS],
    "stepdistill/methods/pcm.py": ["tests/methods/test_pcm.py", OF_CONSISTENCY],
    "stepdistill/methods/reflow.py": ["tests/methods/test_reflow.py", OF_FLOWS],
    "stepdistill/methods/rfpp.py": ["tests/methods/test_reflow_family.py", OF_FLOWS],
    "stepdistill/methods/asd.py": ["tests/methods/test_asd.py", "tests/methods/test_options_matching.py"],
    "stepdistill/methods/rcm.py": ["tests/methods/test_rcm.py", OF_CONSISTENCY],
    "stepdistill/methods/scm.py": ["tests/methods/test_scm.py", OF_CONSISTENCY],
    "stepdistill/losses/continuous_time.py": [
        "tests/methods/test_scm.py",
        "tests/methods/test_rcm.py",
        OF_CONSISTENCY,
    ],
    "stepdistill/methods/slimflow.py": [
        "tests/methods/test_reflow_family.py",
        "tests/families/test_slim.py",
        OF_FLOWS,
    ],
    "stepdistill/methods/tbcm.py": ["tests/methods/test_tbcm.py", OF_CONSISTENCY],
    "stepdistill/methods/tcd.py": ["tests/methods/test_tcd.py", OF_CONSISTENCY],
    "stepdistill/methods/tscd.py": ["tests/methods/test_tscd.py", OF_CONSISTENCY],
    "stepdistill/methods/disback.py": ["tests/methods/test_disback.py", *SHARED],
    "stepdistill/methods/mdt_dist.py": ["tests/methods/test_mdt_dist.py", OF_FLOWS],
    "stepdistill/methods/vdot.py": ["tests/methods/test_vdot.py", *SHARED],
}
"""The test files that are to notice a change in a file, those that fail soonest first."""

EXCEPTIONS: dict[tuple[str, str, str], str] = {
    (
        "stepdistill/methods/ladd.py",
        "self.options.noise_mean + self.options.noise_deviation * draws.normal(stream, ())",
        "(self.options.noise_mean - self.options.noise_deviation * draws.normal(stream, ()))",
    ): "a normal law is its own mirror image",
    (
        "stepdistill/methods/uni_dad.py",
        "if self.target is None or since < 0:",
        "if self.target is None or (since <= 0):",
    ): "both cycles begin with the fake network",
    (
        "stepdistill/methods/uni_dad.py",
        "if self.target is None or since < 0:",
        "if self.target is None or since < (1):",
    ): "both cycles begin with the fake network",
    (
        "stepdistill/methods/uni_dad.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the student's turn nothing that is asked takes a gradient, and the field is a number",
    (
        "stepdistill/methods/gndm.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the student's turn nothing that is asked takes a gradient, and the field is a number",
    (
        "stepdistill/losses/adversarial.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the heads' turn the student's weights take no gradient",
    (
        "stepdistill/losses/adversarial.py",
        'logs = {"gan": loss, "x_std": x.detach().std()}',
        'logs = {"gan": loss, "x_std": (x).std()}',
    ): "what is logged is read alone",
    (
        "stepdistill/methods/lightning.py",
        'critic = part.kind != "regression" and (step - part.first) % 2 == 0',
        'critic = part.kind != "regression" and ((step + part.first)) % 2 == 0',
    ): "sum and difference are both odd or both even",
    (
        "stepdistill/methods/lightning.py",
        "following = self.part(turn.step + 1)",
        "following = self.part(turn.step + (2))",
    ): "a part against the discriminator has two steps and more",
    (
        "stepdistill/losses/jump_gan.py",
        "shares = [1.0] * len(self.times) if of_start else self.shares",
        "shares = [(1.5)] * len(self.times) if of_start else self.shares",
    ): "equal shares, whatever they are",
    (
        "stepdistill/losses/jump_gan.py",
        'which = torch.bucketize(batch.draws.uniform("gan t"), constant(upto, s.device), right=True)',
        'which = torch.bucketize(batch.draws.uniform("gan t"), constant(upto, s.device), right=(False))',
    ): "whether a continuous draw may meet its bound",
    (
        "stepdistill/methods/crd.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "nothing that it asks takes a gradient",
    (
        "stepdistill/methods/crd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "nothing that is asked there takes a gradient",
    (
        "stepdistill/methods/gndmr.py",
        "loss = loss - (advantage * log_density(visit, mean)).mean() / x[0].numel()",
        "loss = loss - (advantage * log_density(visit, mean)).mean() / x[(1)].numel()",
    ): "samples are of one size",
    (
        "stepdistill/losses/groups.py",
        "return apart / (mean_of_group(apart.square(), group).sqrt() + SMALLEST)",
        "return apart / ((mean_of_group(apart.square(), group).sqrt() - SMALLEST))",
    ): "a guard against 0 / 0",
    (
        "stepdistill/methods/internalise.py",
        "LEAST_ALPHA = 1e-3",
        "LEAST_ALPHA = (0.0015)",
    ): "no path has a share of data near it",
    (
        "stepdistill/methods/internalise.py",
        "told = alpha >= LEAST_ALPHA",
        "told = (alpha > LEAST_ALPHA)",
    ): "no path has a share of data near it",
    (
        "stepdistill/methods/internalise.py",
        "return plain, slope, reward.detach()",
        "return plain, slope, (reward)",
    ): "it is logged, and what is logged is read alone",
    (
        "stepdistill/methods/internalise.py",
        "size = slope.flatten(1).norm(dim=1).clamp_min(1e-8)",
        "size = (slope.flatten(1).norm(dim=1))",
    ): "a guard against 0 / 0",
    (
        "stepdistill/methods/internalise.py",
        "x0 = said.x0 + per_sample(torch.where(told, sigma / alpha, 0.0), slope) * up",
        "x0 = said.x0 + per_sample(torch.where(told, sigma / alpha, (1.0)), slope) * up",
    ): "up is 0 there",
    (
        "stepdistill/methods/opd.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "teachers never hold a graph",
    (
        "stepdistill/methods/opd.py",
        "return -(better / visit.x[0].numel()).clamp(-clip, clip) * density",
        "return -(better / visit.x[(1)].numel()).clamp(-clip, clip) * density",
    ): "samples are of one size",
    (
        "stepdistill/methods/opd.py",
        "apart.append(squared(own.x0.detach() - target.x0).mean())",
        "apart.append(squared((own.x0) - target.x0).mean())",
    ): "what is logged is read alone",
    (
        "stepdistill/methods/self_opd.py",
        "apart = torch.cdist(x.flatten(1), alpha[0] * clean.flatten(1)).square()",
        "apart = torch.cdist(x.flatten(1), alpha[(1)] * clean.flatten(1)).square()",
    ): "one time for all",
    (
        "stepdistill/methods/self_opd.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "nothing that is asked there takes a gradient",
    (
        "stepdistill/methods/twinflow.py",
        "bounds = [sum(self.options.parts[: i + 1]) / sum(self.options.parts) for i in range(3)]",
        "bounds = [sum(self.options.parts[: i + 1]) / sum(self.options.parts) for i in range((4))]",
    ): "no draw lies above 1",
    (
        "stepdistill/methods/twinflow.py",
        "return torch.bucketize(drawn, constant(bounds, drawn.device), right=True)",
        "return torch.bucketize(drawn, constant(bounds, drawn.device), right=(False))",
    ): "whether a continuous draw may meet its bound",
    (
        "stepdistill/methods/twinflow.py",
        "apart = (per_sample(t - s, x) * now - summed) / per_sample(leg.clamp_min(SHORTEST), x) - v",
        "apart = (per_sample(t - s, x) * now - summed) / per_sample((leg), x) - v",
    ): "what it guards is not taken",
    (
        "stepdistill/methods/twinflow.py",
        "return torch.where(per_sample(leg, x) > SHORTEST, now - apart.clamp(-1, 1), v)",
        "return torch.where((per_sample(leg, x) >= SHORTEST), now - apart.clamp(-1, 1), v)",
    ): "no leg has that very length",
    (
        "stepdistill/methods/twinflow.py",
        'each, logs["twin"] = each.index_put((rows,), twin), twin.detach().mean()',
        'each, logs["twin"] = each.index_put((rows,), twin), (twin).mean()',
    ): "what is logged is read alone",
    (
        "stepdistill/methods/rcm.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "the slope holds no graph, and what the student says is detached",
    (
        "stepdistill/methods/rcm.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "nothing that is asked there takes a gradient",
    (
        "stepdistill/methods/dmf.py",
        "waves = torch.cat([sinusoid(1000 * time.float(), self.width) for time in (t, s)], 1)",
        "waves = torch.cat([sinusoid((1001) * time.float(), self.width) for time in (t, s)], 1)",
    ): "any unit of time does",
    (
        "stepdistill/methods/ayf.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "what it calls holds no graph",
    (
        "stepdistill/methods/anyflow.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "nothing that is asked there takes a gradient, and what comes out is a number",
    (
        "stepdistill/methods/anyflow.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the fake network's turn the student's weights take no gradient",
    (
        "stepdistill/methods/asd.py",
        "SLOPE_STEP = 0.1",
        "SLOPE_STEP = (0.15000000000000002)",
    ): "how far a slope is taken is a choice",
    (
        "stepdistill/methods/asd.py",
        "return tuple(n for n in range(1, steps + 1) if steps % n == 0)",
        "return tuple(n for n in range(1, steps + (2)) if steps % n == 0)",
    ): "no number has a larger divisor",
    (
        "stepdistill/methods/self_e.py",
        "return per_sample(long / length.clamp_min(1e-12), data) * mixed",
        "return per_sample(long / (length), data) * mixed",
    ): "a guard against 0 / 0",
    (
        "stepdistill/methods/anyflow.py",
        'logs["field"] = mean_size(field := self.field(x.detach(), batch))',
        'logs["field"] = mean_size(field := self.field((x), batch))',
    ): "what comes out is a number",
    (
        "stepdistill/methods/asd.py",
        "aside = None if x.requires_grad else self.fake.features(x_t + way, t, batch.cond)",
        "aside = None if x.requires_grad else self.fake.features((x_t - way), t, batch.cond)",
    ): "a normal law is its own mirror image",
    (
        "stepdistill/methods/asd.py",
        "return found[0], found[1], torch.stack(slopes).sum(0).mean() if slopes else found[0].new_zeros(())",
        "return found[0], found[1], torch.stack(slopes).sum(0).mean() if slopes else found[(1)].new_zeros(())",
    ): "both are of one kind",
    (
        "stepdistill/methods/disback.py",
        "self.towards = 0  # the number of the waypoint that the present turn is led to; 0 is the teacher",
        "self.towards = (1)  # the number of the waypoint that the present turn is led to; 0 is the teacher",
    ): "every loss sets it before it is read",
    (
        "stepdistill/methods/disback.py",
        "return views_of(self.fake, target, x, batch, options, 1.0)",
        "return views_of(self.fake, target, x, batch, options, (1.5))",
    ): "a network in the teacher's place is not guided",
    (
        "stepdistill/methods/disback.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "views hold no graph",
    (
        "stepdistill/methods/asd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "views hold no graph, and what more steps draw is a number in both turns",
    (
        "stepdistill/methods/asd.py",
        "leaf = x.detach().requires_grad_()",
        "leaf = (x).requires_grad_()",
    ): "the slope in it is the same",
    (
        "stepdistill/methods/asd.py",
        'logs |= {"own": told.detach(), "share": pull.norm() / field.norm().clamp_min(1e-12)}',
        'logs |= {"own": (told), "share": pull.norm() / field.norm().clamp_min(1e-12)}',
    ): "what is logged is read alone",
    (
        "stepdistill/methods/asd.py",
        'logs |= {"own": told.detach(), "share": pull.norm() / field.norm().clamp_min(1e-12)}',
        'logs |= {"own": told.detach(), "share": pull.norm() / (field.norm())}',
    ): "a guard against 0 / 0",
    (
        "stepdistill/methods/echo.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "what is drawn there is a number, and nothing that draws it takes a gradient in that turn",
    (
        "stepdistill/losses/distances.py",
        "size = each[0].numel()",
        "size = each[(1)].numel()",
    ): "samples are of one size",
    (
        "stepdistill/methods/mdt_dist.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "what it calls holds no graph",
    (
        "stepdistill/metrics/frechet.py",
        "BLOCK = 512",
        "BLOCK = (513)",
    ): "how much is computed at once",
    (
        "stepdistill/metrics/frechet.py",
        "device = float64_device(device)",
        "pass",
    ): "for devices without float64",
    (
        "stepdistill/metrics/fid_infinity.py",
        "straight = len(features) >= 6 * features.shape[1]",
        "straight = (len(features) < 6 * features.shape[1])",
    ): "two ways to one number",
    (
        "stepdistill/metrics/fid_infinity.py",
        "straight = len(features) >= 6 * features.shape[1]",
        "straight = (len(features) > 6 * features.shape[1])",
    ): "two ways to one number",
    (
        "stepdistill/metrics/fid_infinity.py",
        "straight = len(features) >= 6 * features.shape[1]",
        "straight = len(features) >= (7) * features.shape[1]",
    ): "two ways to one number",
    (
        "stepdistill/metrics/fid_infinity.py",
        "straight = len(features) >= 6 * features.shape[1]",
        "straight = len(features) >= 6 * features.shape[(2)]",
    ): "two ways to one number",
    (
        "stepdistill/metrics/fid_infinity.py",
        "straight = len(features) >= 6 * features.shape[1]",
        "straight = len(features) >= (6 / features.shape[1])",
    ): "two ways to one number",
    (
        "stepdistill/metrics/fid_infinity.py",
        "each = 12 // parts",
        "each = (13) // parts",
    ): "the same for every number of parts",
    (
        "stepdistill/metrics/frechet.py",
        "few, many = (x, y) if len(x) <= len(y) else (y, x)",
        "few, many = (x, y) if (len(x) < len(y)) else (y, x)",
    ): "a distance is the same from both sides",
    (
        "stepdistill/metrics/frechet.py",
        "few, many = (x, y) if len(x) <= len(y) else (y, x)",
        "few, many = (x, y) if (len(x) > len(y)) else (y, x)",
    ): "a distance is the same from both sides",
    (
        "stepdistill/metrics/frechet.py",
        "few, many = (x, y) if len(x) <= len(y) else (y, x)",
        "few, many = ((y, x) if len(x) <= len(y) else (x, y))",
    ): "a distance is the same from both sides",
    (
        "stepdistill/metrics/frechet.py",
        "if count > dimension:",
        "if (count >= dimension):",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet.py",
        "if 2 * len(few) > few.shape[1]:",
        "if (2 * len(few) <= few.shape[1]):",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet.py",
        "if 2 * len(few) > few.shape[1]:",
        "if (2 * len(few) >= few.shape[1]):",
    ): "two ways to one number",
    (
        "stepdistill/metrics/cmmd.py",
        "return (-squares.clamp_min(0) / (2 * SIGMA**2)).exp()",
        "return (-(squares) / (2 * SIGMA**2)).exp()",
    ): "a guard against rounding: the squares are of differences",
    (
        "stepdistill/networks/derivative.py",
        "return rate.detach()",
        "return (rate)",
    ): "under no_grad there is no graph to leave",
    (
        "stepdistill/networks/derivative.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "a graph of the value alone, whose norm is taken as a number: time and memory of one call",
    (
        "stepdistill/networks/derivative.py",
        "scale = max(float(rate.norm()), float(fn(*primals).norm()), math.ulp(0.0))",
        "scale = max(float(rate.norm()), float(fn(*primals).norm()), math.ulp((1.0)))",
    ): "a floor: what is divided is 0 where both norms are",
    (
        "stepdistill/methods/consistency.py",
        "intervals = min(self.options.grid * 2 ** min(self.stage(step), 30), self.options.grid_max)",
        "intervals = min(self.options.grid * 2 ** min(self.stage(step), (31)), self.options.grid_max)",
    ): "no grid that fits in memory has 2^30 intervals",
    (
        "stepdistill/methods/consistency.py",
        "t = torch.where(level >= self.high * (1 - 1e-5), torch.ones_like(t), t)",
        "t = torch.where((level > self.high * (1 - 1e-05)), torch.ones_like(t), t)",
    ): "whether a tolerance allows the very number that it ends at",
    (
        "stepdistill/methods/consistency.py",
        "level <= self.low * (1 + 1e-5), torch.full_like(t, last_time(self.student.path)), t",
        "(level < self.low * (1 + 1e-05)), torch.full_like(t, last_time(self.student.path)), t",
    ): "whether a tolerance allows the very number that it ends at",
    (
        "stepdistill/methods/consistency.py",
        'i = torch.searchsorted(law.cumsum(0), draws.uniform("interval"), right=True)',
        'i = torch.searchsorted(law.cumsum(0), draws.uniform("interval"), right=(False))',
    ): "whether a continuous draw may meet its bound",
    (
        "stepdistill/methods/consistency.py",
        't = (options.log_mean + options.log_deviation * draws.normal("level", ())).exp()',
        "t = ((options.log_mean - options.log_deviation * draws.normal('level', ()))).exp()",
    ): "a normal draw is as likely as its negative",
    (
        "stepdistill/methods/consistency.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "the teacher is frozen and its input has no graph: there is none to record",
    (
        "stepdistill/methods/dmd.py",
        "called_at = self.times[call] if call else 1.0  # pure noise settles nothing, wherever it is handed in",
        "called_at = self.times[call] if call else (1.5)  # pure noise settles nothing, wherever it is handed in",
    ): "no time above 1 is drawn",
    (
        "stepdistill/export/schedulers.py",
        "if sampler.times[0] < 1 - 1.5e-3:",
        "if (sampler.times[0] <= 1 - 0.0015):",
    ): "whether a tolerance allows the very number that it ends at",
    (
        "stepdistill/export/schedulers.py",
        "return round(t * (1 - u) / (u * (1 - t)), 6)",
        "return round(t * (1 - u) / (u * (1 - t)), (7))",
    ): "digits of a number that a config shows",
    (
        "stepdistill/export/schedulers.py",
        "divisors = [n for n in range(2, path.steps + 1) if path.steps % n == 0]",
        "divisors = [n for n in range(2, path.steps + (2)) if path.steps % n == 0]",
    ): "one more than a number does not divide it",
    (
        "stepdistill/export/schedulers.py",
        "if max(abs(a - b) for a, b in zip(grid, sampler.times, strict=True)) > allowed:",
        "if (max((abs(a - b) for a, b in zip(grid, sampler.times, strict=True))) >= allowed):",
    ): "whether a tolerance allows the very number that it ends at",
    (
        "stepdistill/networks/sampler.py",
        "return last.x0 if self.gamma is None else last.at(_past(denoiser.path, torch.zeros_like(t), 0.0))",
        "return last.x0 if self.gamma is None else last.at(_past(denoiser.path, torch.zeros_like(t), (1.0)))",
    ): "past the end of a table is its timestep 0, whatever share is taken of nothing",
    (
        "stepdistill/methods/f_distill.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "the field that is made of it is taken as a number",
    (
        "stepdistill/methods/f_distill.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "its only caller records no graph",
    (
        "stepdistill/methods/dmd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "the views have no graph of their own, and the field is taken as a number",
    (
        "stepdistill/losses/decoupled_guidance.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "what is made of it, in DMD's field, is taken as a number",
    (
        "stepdistill/losses/first_step.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "the teacher is frozen and noise has no graph: there is none to record",
    (
        "stepdistill/methods/phased_dmd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "of the field, whose views have no graph, and of the fake network's turn, in which the experts take no gradient",
    (
        "stepdistill/methods/pcm.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the discriminator's turn the student's weights take no gradient: time and memory of one call",
    (
        "stepdistill/methods/diff_instruct.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "the views have no graph of their own, and the field is taken as a number",
    (
        "stepdistill/methods/meanflow.py",
        "error = now - self.equations.eulerian(x, t, s, cond, now.detach(), self.share(turn.step), along)",
        "error = now - self.equations.eulerian(x, t, s, cond, (now), self.share(turn.step), along)",
    ): "what the equations return has no graph",
    (
        "stepdistill/losses/continuous_time.py",
        "def __init__(self, waves: int = 8) -> None:",
        "def __init__(self, waves: int = (9)) -> None:",
    ): "how finely the weight may depend on the angle is a choice",
    (
        "stepdistill/losses/continuous_time.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "the teacher is frozen, F has no graph and derivatives return numbers: there is none to record",
    (
        "stepdistill/losses/continuous_time.py",
        "size = g.flatten(1).norm(dim=1) / math.sqrt(g[0].numel())  # [B]",
        "size = g.flatten(1).norm(dim=1) / math.sqrt(g[(1)].numel())  # [B]",
    ): "the samples of a batch are of one size",
    (
        "stepdistill/methods/rfpp.py",
        "return torch.where(side < 0.5, y, 1 - y)",
        "return torch.where((side >= 0.5), y, 1 - y)",
    ): "one side is as likely as the other",
    (
        "stepdistill/methods/rfpp.py",
        "return torch.where(side < 0.5, y, 1 - y)",
        "return torch.where((side <= 0.5), y, 1 - y)",
    ): "whether a continuous draw may meet its bound",
    (
        "stepdistill/methods/rfpp.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "the teacher is frozen and the pair has no graph: there is none to record",
    (
        "stepdistill/methods/slimflow.py",
        'return math.sqrt(1 - beta**2) * z + beta * batch.draws.normal("anneal", tuple(z.shape[1:]))',
        "return (math.sqrt(1 - beta ** 2) * z - beta * batch.draws.normal('anneal', tuple(z.shape[1:])))",
    ): "a normal draw is as likely as its negative",
    (
        "stepdistill/methods/sim.py",
        "c = self.options.c * math.sqrt(y[0].numel())",
        "c = self.options.c * math.sqrt(y[(1)].numel())",
    ): "the samples of a batch are of one size",
    (
        "stepdistill/methods/tbcm.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "the teacher is frozen and its noise has no graph: there is none to record",
    (
        "stepdistill/methods/tscd.py",
        "ONE_STEP = Sampler((1.0,), renoise=False)",
        "ONE_STEP = Sampler((1.0,), renoise=(True))",
    ): "one step has nothing after it to noise",
    (
        "stepdistill/methods/tscd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "in the critics' turn the student's weights take no gradient: time and memory of one call",
    (
        "stepdistill/networks/sampler.py",
        "if max(abs(t - (1 - i * gap)) for i, t in enumerate(self.times)) > 1.5e-3:",
        "if (max((abs(t - (1 - i * gap)) for i, t in enumerate(self.times))) >= 0.0015):",
    ): "whether a tolerance allows the very number that it ends at",
    (
        "stepdistill/methods/tcd.py",
        'e = (draws.uniform("end") * (m + 1)).floor().clamp(max=m)',
        "e = ((draws.uniform('end') * (m + 1)).floor())",
    ): "a guard against rounding: the largest uniform, 1 - 2^-24, times m + 1 rounds to m + 1 for no m below 2^23",
}
"""(file, line as it is, line as changed) -> why no test is to notice."""

LONG = (
    "gaussian_student_home",
    "with_an_eps_head_follows",
    "embedded_teacher",
    "a_teacher_needs_no_unconditional_mode",
    "learns_the_density_ratio",
    "embedded_images",
    "runs_that_fail_stop",
    "a_process_without_stepdistill",
    "a_stock_folder",
)
CHOICE = ["-m", "slow or not slow", "-k", " and ".join(f"not {name}" for name in LONG)]
IN_ONE_PROCESS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPPOSITE = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
EDGE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
DROPPED = {"detach", "clamp", "clamp_min", "clamp_max", "abs", "square", "sqrt", "exp", "reciprocal", "flip"}
"""Methods of tensors without whose call there is still a tensor."""


@dataclass(frozen=True)
class Mutant:
    """A file's text with one change, and the first line in which the two differ."""

    file: str
    text: str
    line: int
    old: str
    new: str


def changes(node: ast.AST) -> Iterator[ast.AST | str]:
    """What a node may be changed into: another node, or a text."""
    match node:
        case ast.BinOp(_, _, ast.Constant(float(value))) | ast.Constant(float(value)) if 0 < value <= 1e-4:
            return
        case ast.Assign(_, ast.Call(ast.Name("cast"))):
            return
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
            if isinstance(op, ast.Add | ast.Sub):
                yield left
        case ast.Compare(left, [op], [right]):
            for table in (OPPOSITE, EDGE):
                if type(op) in table and not (table is EDGE and _is_draw(left)):
                    yield ast.Compare(left, [table[type(op)]()], [right])
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(1.5 * value + (value == 0))
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(ast.Attribute(ast.Name("torch"), "no_grad"), [], []):
            yield "torch.enable_grad()"
        case ast.Call(ast.Attribute(tensor, name), _, _) if name in DROPPED and not _is_torch(tensor):
            yield tensor
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "pass"
        case ast.Assign([ast.Name(name)], value) if name in {
            n.id for n in ast.walk(value) if isinstance(n, ast.Name)
        }:
            yield "pass"


def _is_torch(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "F")


def _is_draw(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "uniform"


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but annotations, imports, messages of errors, and defaults of options."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_times":
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(
        "Annotated["
    ):  # it is in classes already
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    # How much is computed at once changes no number.
    named = zip(node.kwonlyargs, node.kw_defaults, strict=True) if isinstance(node, ast.arguments) else ()
    sizes = [default for argument, default in named if argument.arg == "block"]
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (name == "decorator_list" and isinstance(node, ast.ClassDef)):
            continue
        for child in value if isinstance(value, list) else [value]:
            option = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            if isinstance(child, ast.AST) and not option and not (name == "kw_defaults" and child in sizes):
                yield from visited(child)


def mutants(file: str) -> Iterator[Mutant]:
    """Every change of a file."""
    text = (ROOT / file).read_text()
    data, tree = text.encode(), ast.parse(text)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen = {text}
    for node in visited(tree):
        for change in changes(node):
            assert (
                isinstance(node, ast.expr | ast.stmt) and node.end_lineno and node.end_col_offset is not None
            )
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + node.end_col_offset
            new = change if isinstance(change, str) else ast.unparse(change)
            if isinstance(node, ast.expr):
                new = f"({new})" if not isinstance(change, str) else new
            made = (data[:first] + new.encode() + data[last:]).decode()
            if made in seen:
                continue
            seen.add(made)
            with contextlib.suppress(SyntaxError):
                ast.parse(made)
                line = node.lineno
                yield Mutant(
                    file, made, line, text.splitlines()[line - 1].strip(), made.splitlines()[line - 1].strip()
                )


# --- a mutant in place -------------------------------------------------------------------------------------------


def graft(module: ModuleType, text: str) -> None:
    """Puts what ``text`` says into a module that is in use: other code of functions, other values of constants."""
    assert module.__file__ is not None
    new = ModuleType(module.__name__)
    new.__dict__.update({"__file__": module.__file__, "__package__": module.__package__})
    sys.modules[module.__name__] = new  # what dataclasses and pydantic look names up in
    try:
        exec(compile(text, module.__file__, "exec"), new.__dict__)
    finally:
        sys.modules[module.__name__] = module
    for name, value in new.__dict__.items():
        if not name.startswith("__") and name in module.__dict__:
            _replace(module, name, module.__dict__[name], value, module.__name__)


def _replace(owner: Any, name: str, old: Any, new: Any, home: str) -> None:
    """One name of a module or a class: grafted where other code may hold it, else set."""
    if isinstance(old, type):
        if old.__module__ == home and old is not new:
            for key, value in vars(new).items():
                if key == "__pydantic_validator__":
                    setattr(old, key, value)
                elif key in vars(old) and (callable(value) or not key.startswith("__")):
                    _replace(old, key, vars(old)[key], value, home)
    elif isinstance(old, cached_property):
        _regrow(old.func, new.func, home)
    elif isinstance(old, property):
        for one, other in ((old.fget, new.fget), (old.fset, new.fset)):
            _regrow(one, other, home)
    elif isinstance(old, FunctionType) and old.__code__.co_freevars != new.__code__.co_freevars:
        cells = {
            key: cell
            for function in (new, old)
            for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        }
        closure = tuple(cells[key] for key in new.__code__.co_freevars)
        made = FunctionType(new.__code__, old.__globals__, old.__name__, new.__defaults__, closure)
        made.__kwdefaults__ = new.__kwdefaults__
        setattr(owner, name, made)
    elif isinstance(old, FunctionType | classmethod | staticmethod) or hasattr(old, "__wrapped__"):
        _regrow(old, new, home)
    elif isinstance(old, dict) and any(isinstance(value, FunctionType) for value in old.values()):
        for key, value in old.items():  # a table of functions, which tests may hold as well
            if isinstance(value, FunctionType):
                _regrow(value, new[key], home)
    elif (isinstance(old, PLAIN) and not name.startswith(("model_", "_"))) or (
        is_dataclass(old) and type(old).__module__ != home
    ):
        setattr(owner, name, new)


def _regrow(old: Any, new: Any, home: str) -> None:
    """The code, defaults and closed-over values of a function, under whatever wraps it."""
    if old is None or old is new:
        return
    if not isinstance(old, FunctionType):
        inner = "__func__" if isinstance(old, classmethod | staticmethod) else "__wrapped__"
        _regrow(getattr(old, inner), getattr(new, inner), home)
        return
    if not old.__module__.startswith("stepdistill") and not hasattr(old, "__wrapped__"):
        return
    if old.__code__ is not new.__code__:
        old.__code__ = new.__code__
    old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    for mine, other in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
        if isinstance(mine.cell_contents, FunctionType):
            _regrow(mine.cell_contents, other.cell_contents, home)
        elif not isinstance(mine.cell_contents, type):  # `super()` stays that of the class in use
            mine.cell_contents = other.cell_contents


PLAIN = (int, float, str, bool, tuple, frozenset, type(None))


# --- the tests of a mutant ---------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of the tests of one mutant.

    Attributes:
        killed: whether one failed, or the processor time ran out.
        by: which one failed.
        took: processor time, in seconds.
        seconds: the time of each test that ran.
    """

    killed: bool
    by: str
    took: float
    seconds: dict[str, float]


class Loop:
    """A plugin of pytest that runs the collected tests once for each mutant, every time in a fork of this process.

    Args:
        file: what is changed.
        chosen: its mutants.
        say: where results are printed.
        folder: for what a fork has to say, and for its output.
    """

    def __init__(self, file: str, chosen: list[Mutant], say: TextIO, folder: Path) -> None:
        self.file, self.chosen, self.say, self.folder = file, chosen, say, folder
        self.name = file.removesuffix(".py").replace("/", ".")
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.survived = 0
        self.finished = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = [report.nodeid]

    def pytest_runtestloop(self, session: Any) -> bool:
        text = (ROOT / self.file).read_text()
        whole = self.run(session, text, 3600)
        if whole.killed:
            print(f"{self.file}: {whole.by} fails without a change, see {self.folder}", file=self.say)
            os._exit(2)
        self.seconds = whole.seconds
        print(f"{self.file}: {len(session.items)} tests, {whole.took:.0f} s", file=self.say, flush=True)
        for mutant in self.chosen:
            found = self.run(session, mutant.text, int(3 * whole.took) + 20)
            reason = EXCEPTIONS.get((self.file, mutant.old, mutant.new))
            said = "killed  " if found.killed else "excepted" if reason else "SURVIVED"
            self.survived += said == "SURVIVED"
            if found.by:
                self.failed = [found.by, *(name for name in self.failed if name != found.by)]
            by = f" by {found.by}" if found.by else ""
            print(
                f"{said} {self.file}:{mutant.line} in {found.took:.1f} s{by}\n    - {mutant.old}\n    + {mutant.new}",
                file=self.say, flush=True,
            )  # fmt: skip
        self.finished = bool(session.items)
        return True

    def run(self, session: Any, text: str, seconds: int) -> Outcome:
        """The tests, those that killed before first and then the quick ones, on the file with another text."""
        place = self.folder / "outcome.json"
        rank = {name: i for i, name in enumerate(self.failed)}
        items = sorted(
            session.items, key=lambda it: (rank.get(it.nodeid, len(rank)), self.seconds.get(it.nodeid, 0.0))
        )
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            self.seconds, self.failed = {}, []
            try:
                graft(sys.modules[self.name], text)
                for item, after in zip(items, [*items[1:], None], strict=True):
                    session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                    if self.failed:
                        break
            except BaseException as error:  # a mutant that cannot be imported is killed
                self.failed = [f"{type(error).__name__}: {error}"]
            place.write_text(json.dumps([self.failed, self.seconds]))
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        failed, seen = ([], {})
        if place.exists():
            failed, seen = json.loads(place.read_text())
            place.unlink()
        by = failed[0] if failed else ""
        return Outcome(bool(failed or status), by, used.ru_utime + used.ru_stime, seen)


def started(file: str, chosen: list[Mutant], folder: Path) -> int:
    """A process of its own that runs a file's mutants; it ends with 10 plus how many survived."""
    child = os.fork()
    if child == 0:
        say = os.fdopen(os.dup(1), "w")
        with open(folder / "output.txt", "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.chdir(ROOT)
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toys"), str(ROOT / "tests" / "methods")]
        import pytest

        importlib.import_module(file.removesuffix(".py").replace("/", "."))
        loop = Loop(file, chosen, say, folder)
        declared = DECLARED if file.startswith("stepdistill/methods/") else []
        pytest.main([*IN_ONE_PROCESS, *CHOICE, *GUARDS[file], *declared], [loop])
        say.flush()
        os._exit(min(loop.survived, 200) + 10 if loop.finished else 3)
    return child


def ended(file: str, status: int, folder: Path) -> int:
    """How many survived in a process that ended with ``status``."""
    if os.waitstatus_to_exitcode(status) < 10:
        shutil.copy(folder / "output.txt", "mutants-output.txt")
        raise SystemExit(f"{file}: its tests could not be run, see mutants-output.txt")
    return os.waitstatus_to_exitcode(status) - 10


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of GUARDS; default all")
    parser.add_argument("--lines", default="1-100000", help="first and last line to change")
    parser.add_argument("--every", type=int, default=1, help="only each n-th mutant")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    arguments = parser.parse_args()
    first, last = map(int, arguments.lines.split("-"))
    odd = [file for file in arguments.files if file not in GUARDS]
    if odd:
        parser.error(f"{odd[0]} has no tests in GUARDS: it has {', '.join(GUARDS)}")
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401  # imported once, before the forks

    survived = total = 0
    waiting, running = list(arguments.files or GUARDS), {}
    with tempfile.TemporaryDirectory() as name:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                file = waiting.pop(0)
                folder = Path(name) / file.replace("/", "-")
                folder.mkdir()
                chosen = [m for m in mutants(file) if first <= m.line <= last][:: arguments.every]
                running[started(file, chosen, folder)] = file, len(chosen), folder
            child, status = os.wait()
            file, count, folder = running.pop(child)
            left = ended(file, status, folder)
            print(f"{file}: {count} mutants, {left} survived", flush=True)
            total, survived = total + count, survived + left
    print(f"{total} mutants, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
