"""Training one pair: the loop, its stages, run directories and results."""
