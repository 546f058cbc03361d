"""Low-bit matrix products with real zero-points: the layout, its definition, the kernels behind one dispatch."""
