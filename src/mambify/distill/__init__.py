"""Recovering the teacher's quality: losses, stages, recipes, and the run that goes through them."""
