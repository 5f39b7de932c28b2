"""Whole jobs made of several stages: what a command or a script runs in one go.

Stages do not import each other; these modules do, and nothing below ``experiments`` imports them.
"""
