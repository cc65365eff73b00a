"""Prompts, images and pairs: from files to the batches of any step.

The same (seed, step, sample) gives the same row in any run, resumed or not. Training and evaluation come in here.
"""
