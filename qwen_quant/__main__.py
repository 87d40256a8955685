"""`python -m qwen_quant` is the `qwen-quant` command."""

from qwen_quant.cli import main

if __name__ == "__main__":
    main()
