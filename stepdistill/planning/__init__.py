"""What a run will need, from configs alone: memory by role and by moment, disk, arithmetic, hours.

``from_configs.py`` makes pipelines of fake tensors; ``live_bytes.py`` counts what is in memory while code runs on them;
``unit.py`` runs updates of the real method code; ``plan.py`` puts it together, ``changes.py`` says what would fit.
"""
