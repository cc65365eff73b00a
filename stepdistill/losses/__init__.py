"""What a method is (``contract.py``), and the parts that several methods' losses are made of.

A part that serves one method alone stands in that method's file.
"""
