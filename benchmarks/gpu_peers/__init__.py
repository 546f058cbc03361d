"""The contenders of ``gpu_kernels.py``: ours, the dense product, and the peers, one file each.

A peer says why it cannot run a layer (``refuse``) and brings the layer's weights into its own layout (``prepare``).
"""
