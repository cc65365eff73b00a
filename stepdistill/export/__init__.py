"""A trained student becomes a folder that others load, and the proof of it.

``student_folder.py`` writes, ``verify.py`` loads it in a fresh process without this package and compares pictures.
"""
