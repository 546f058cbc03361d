"""Widths per layer under a budget of bytes: what a layer loses at each width, and the best choice for all of them."""
