"""What quantization does to a model that lies in a folder: `neuqi eval`, its plot and the quality card."""
