"""Hybrids inside of other people's programs, where no stock architecture carries them."""
