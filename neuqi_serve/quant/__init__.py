"""The mathematics of quantization: tensors in, tensors out; no files, no logging, no engine."""
