"""A run's page while it trains: what is answered to which address, and the server on this machine alone.

Imports no torch: what is watched needs all of it.
"""
