"""What a run will need, from configs alone: memory by role and by moment, disk, arithmetic, hours.

``from_configs.py`` makes pipelines of fake tensors; ``live_bytes.py`` counts what is in memory while code runs on them,
``fake.py`` is where it does; ``unit.py`` has the updates of the real method code, ``trace.py`` what is seen in them.
"""
