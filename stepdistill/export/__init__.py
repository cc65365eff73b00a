"""A trained student becomes a folder that others load, and the proof of it.

``schedulers.py`` chooses the scheduler that draws as the student's sampler does, ``student_folder.py`` writes the
folder, ``verify.py`` loads it in a fresh process without this package and compares pictures.
"""
