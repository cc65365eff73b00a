"""Training a small text-to-image teacher from the embedded emoji: see ``train/make_teacher.py``."""
