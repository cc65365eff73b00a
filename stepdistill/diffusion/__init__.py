"""Paths, predictions, guidance, ODE steps and random numbers: mathematics, without a network.

A time t is in [0, 1], 0 data and 1 noise; a path says what a state holds there, a prediction what a network said of it.
"""
