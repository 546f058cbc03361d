"""Packed weights that a start of the server keeps for the next one, found by what they were made of."""
