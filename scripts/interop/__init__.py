"""Parts of scripts/interop.py: artifacts, references, environments, and the programs that run inside them."""
