"""Training a small text-to-image teacher from the embedded emoji: see ``train/make_teacher.py``.

Apart from all else: nothing imports it, and it imports little of the rest.
"""
