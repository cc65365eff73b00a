"""Parts of every page and sheet: HTML and its style, charts, numbers with their errors, rows of pictures.

What a page is about stands with its owner, in evaluation/page.py, comparison/page.py and training/run_page.py.
"""
