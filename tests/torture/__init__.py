"""Promises tried hard: kills, faults, flipped bits, hostile files. `make torture` runs all trials, the suite a few.

Every module beside harness.py that has PARTS, a tuple of `harness.Part`, is found and run.
"""
