"""Low-bit matrix multiplication with real zero-points: the layout, its definition, and the kernels behind one dispatch."""
