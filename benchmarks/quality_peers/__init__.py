"""What ``quality.py --peers`` compares with: other quantizers from their own packages, and texts to compare on."""
