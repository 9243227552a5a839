"""Promises tried hard: kills, faults, flipped bits, hostile files. `make torture` runs all, `make test` a sample."""
