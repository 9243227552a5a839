"""The process: signals, the lock of a run directory, provenance."""
