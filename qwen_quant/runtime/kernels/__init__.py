"""Matrix products with quantized weights: the reference, torch's packed kernels, and one compiled on the machine."""
