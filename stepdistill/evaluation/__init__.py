"""Scores of a pipeline, or of images that are there, by a suite's protocol.

From prompts to pictures (``drawing``, ``shards``), to features (``extraction``), to scores (``measure``), to a report
(``scores``, ``statement``, ``page``). ``suite`` is the protocol, ``reference`` what it is compared with.
"""
