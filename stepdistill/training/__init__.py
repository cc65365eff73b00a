"""One run: from a recipe to a trained student, its folder and its report.

``distil.py`` is the way in, ``assemble.py`` puts a run together, ``loop.py`` is the one loop. It knows no method.
"""
