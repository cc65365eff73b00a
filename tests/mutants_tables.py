"""Which tests are to notice a change of a file, and changes that none is to notice: the tables of mutants.py."""

from __future__ import annotations

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
            *("clip_score", "cmmd", "diversity", "fid_infinity", "frechet", "frechet_error"),
            *(
                "inception_score",
                "standard_errors",
                "kid",
                "mmd",
                "pick_score",
                "prdc",
                "sample_size",
                "sfid",
            ),
        )
    },
    "stepdistill/metrics/spectrum.py": ["tests/metrics/test_spectrum.py"],
    "stepdistill/metrics/colours.py": [
        "tests/training/test_rewards.py",
        "tests/evaluation/test_own_metric.py",
    ],
    "stepdistill/evaluation/paired.py": ["tests/evaluation/test_paired.py"],
    "stepdistill/pictures/given.py": ["tests/pictures/test_given.py"],
    "stepdistill/evaluation/asked.py": ["tests/export/test_from_picture.py"],
    **{
        f"stepdistill/families/{name}.py": ["tests/families/test_from_picture.py"]
        for name in ("_from_picture", "flux_kontext", "qwen_image_edit", "wan_from_picture")
    },
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
    "stepdistill/losses/terms.py": [
        "tests/methods/test_options_matching.py",
        "tests/losses/test_terms.py",
        "tests/losses/test_reward_term.py",
    ],
    "stepdistill/losses/objective.py": ["tests/losses/test_terms.py", "tests/losses/test_reward_term.py"],
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
        "stepdistill/comparison/ranking.py",
        "return math.hypot(own, self.deviation[score] / math.sqrt(self.seeds or 1))",
        "return math.hypot(own, self.deviation[score] / math.sqrt(self.seeds or (2)))",
    ): "where a deviation is known, so are the seeds",
    (
        "stepdistill/methods/vdot.py",
        "clouds = [a, b][: 1 + of_real] if self.options.debiased else []",
        "clouds = [a, b][: (2) + of_real] if self.options.debiased else []",
    ): "one plan more, which nobody reads",
    (
        "stepdistill/methods/vdot.py",
        "(_, forth, a, b), *own = self.plans(views, of_real=False)",
        "(_, forth, a, b), *own = self.plans(views, of_real=(True))",
    ): "one plan more, which nobody reads",
    (
        "stepdistill/losses/objective.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "what a critic reads of it is detached",
    (
        "stepdistill/losses/reweighting.py",
        "one = torch.where(high > low, (seen - low) / (high - low).clamp_min(1e-20), torch.ones_like(seen))",
        "one = torch.where(high > low, (seen - low) / (high - low), torch.ones_like(seen))",
    ): "a guard against 0 / 0 in what is not taken",
    (
        "stepdistill/losses/reward_term.py",
        "leaf = part.detach().requires_grad_()",
        "leaf = (part).requires_grad_()",
    ): "the slope in it is the same",
    (
        "stepdistill/losses/rewards.py",
        "leaf = x0.detach().requires_grad_()",
        "leaf = (x0).requires_grad_()",
    ): "the slope in it is the same",
    (
        "stepdistill/losses/rewards.py",
        "leaf = images.detach().requires_grad_()",
        "leaf = (images).requires_grad_()",
    ): "decoded without a graph, they are no part of one",
    (
        "stepdistill/losses/rewards.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "what is decoded is read alone",
    (
        "stepdistill/losses/gan.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "what is seen is a number, with a graph or without",
    (
        "stepdistill/losses/gan.py",
        "Heads(family.layer_shapes(networks_in(eye.net)[0], eye.shape))  # of several, each has its own",
        "Heads(family.layer_shapes(networks_in(eye.net)[(1)], eye.shape))  # of several, each has its own",
    ): "several networks are of one shape",
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
        "stepdistill/metrics/frechet.py",
        "if 2 * len(few) > few.shape[1]:",
        "if (2 / len(few)) > few.shape[1]:",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet.py",
        "if 2 * len(few) > few.shape[1]:",
        "if (3) * len(few) > few.shape[1]:",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet.py",
        "shared = torch.linalg.svdvals(centred @ other.T)[: len(few) - 1].sum()",
        "shared = torch.linalg.svdvals(centred @ other.T)[: (len(few) + 1)].sum()",
    ): "the last one is 0, as the mean is taken off",
    (
        "stepdistill/metrics/frechet.py",
        "shared = torch.linalg.svdvals(centred @ other.T)[: len(few) - 1].sum()",
        "shared = torch.linalg.svdvals(centred @ other.T)[: (len(few))].sum()",
    ): "the last one is 0, as the mean is taken off",
    (
        "stepdistill/metrics/frechet.py",
        "if count <= len(covariance):",
        "if (count > len(covariance)):",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet.py",
        "if count <= len(covariance):",
        "if (count < len(covariance)):",
    ): "two ways to one number",
    (
        "stepdistill/metrics/frechet_error.py",
        "GROUPS = 20",
        "GROUPS = (21)",
    ): "how many is a choice",
    (
        "stepdistill/metrics/standard_errors.py",
        "statistic: Callable[[Tensor], float], count: int, *, groups: int = 20, seed: int = 0",
        "statistic: Callable[[Tensor], float], count: int, *, groups: int = 20, seed: int = (1)",
    ): "any order does",
    (
        "stepdistill/metrics/standard_errors.py",
        "statistic: Callable[[Tensor], float], count: int, *, groups: int = 20, seed: int = 0",
        "statistic: Callable[[Tensor], float], count: int, *, groups: int = (21), seed: int = 0",
    ): "how many is a choice",
    (
        "stepdistill/methods/twinflow.py",
        "own = (x[i] - per_sample(t[i], x) * now[i]).detach()",
        "own = (x[i] - per_sample(t[i], x) * now[i])",
    ): "the field is a number",
    (
        "stepdistill/metrics/kid.py",
        "without = (whole - 2 * rows) / ((count - 1) * (count - 2))  # [N]",
        "without = ((whole + 2 * rows)) / ((count - 1) * (count - 2))  # [N]",
    ): "its variance alone is read",
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
