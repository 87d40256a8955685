"""Running quantized folders: loading them and their linears."""
