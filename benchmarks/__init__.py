"""Measurements of kd beside other implementations."""
