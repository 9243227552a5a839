"""Recipes: their settings, how YAML and the command line are read, and the checked Recipe that results."""
