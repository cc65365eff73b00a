"""One run: from a recipe to a trained student, its folder and its report.

``distil.py`` is the way in, ``assemble.py`` puts a run together, ``loop.py`` is the one loop, ``health.py`` stops it at
the first number that is not finite, ``finish.py`` exports and measures. It knows no method.
"""
