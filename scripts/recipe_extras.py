"""The pip extras that a recipe's formats need, as "gguf,mlx": python scripts/recipe_extras.py recipes/demo.toml"""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_quant.export.formats import find_format
from qwen_quant.releasing.settings import load_release, targets_of


def main() -> None:
    recipe = load_release(Path(sys.argv[1]))
    extras = {find_format(row.format).extra for row in targets_of(recipe, "")}
    print(",".join(sorted(extras - {""})))


if __name__ == "__main__":
    main()
