"""The model card: what a student is, how it was made, how it scored, how to load it."""

from mambify.card.render import CARD, render_card

__all__ = ["CARD", "render_card"]
