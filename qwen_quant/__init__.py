"""qwen-quant: turn Qwen checkpoints into quantized artifacts that can be trusted and released."""

__version__ = "0.1.0"
