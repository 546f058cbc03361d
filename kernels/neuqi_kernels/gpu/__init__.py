"""The Triton kernels: fused de-quantization and matrix product on GPUs."""
