"""Whole models: which layers are quantized, and the walk from an unquantized folder to a packed one."""
