"""Metrics: pure functions of features, and streaming states that can be merged in any order."""
