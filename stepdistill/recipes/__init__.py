"""A run's configuration: YAML and --set become frozen models.

Nothing here imports torch or knows a method: a recipe is read, or refused, at once.
"""
