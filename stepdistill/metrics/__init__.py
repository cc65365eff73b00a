"""Metrics: pure functions of features, and streaming states that can be merged in any order.

One file a metric, named after it. Evaluation comes in here; no metric draws, reads a file or knows a network.
"""
