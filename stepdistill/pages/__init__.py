"""Parts of every page and sheet: HTML, curves, numbers with their errors, rows of pictures.

What a page is about stands with its owner, in evaluation/page.py and comparison/page.py.
"""
