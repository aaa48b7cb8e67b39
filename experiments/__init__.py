"""Experiments over several seeds: the paper's figures and tables, and the questions it leaves open.

`python -m experiments` lists them, `python -m experiments NAME` runs one.
"""
