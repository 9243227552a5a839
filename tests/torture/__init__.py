"""Promises tried hard: kills, faults, flipped bits, hostile files. Small counts run in the suite, all by `make torture`.

Every module beside harness.py that has PARTS, a tuple of `harness.Part`, is found and run.
"""
