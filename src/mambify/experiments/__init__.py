"""Comparisons of whole trainings: recipes against each other, and the tables of arXiv 2408.15237 at small scale.

An experiment is a list of runs. Each has a folder named by all that decides its outcome, so that what is done is never
done again, whichever experiment asks for it; runs that fail are named, and cost the others nothing.
"""
