"""Light distillation: scales, zero-points, norms and biases of a packed model, trained towards its original."""
