"""What the push of a release asks for, checked before its first stage: python scripts/check_push.py RECIPE REPO

REPO may be "": the recipe's then. Exits with the error's code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_quant.console import error_text
from qwen_quant.errors import QwenQuantError
from qwen_quant.releasing.ahead import check_push
from qwen_quant.releasing.settings import check_repo, load_release


def main() -> int:
    try:
        recipe = load_release(Path(sys.argv[1]))
        check_repo(sys.argv[2])
        check_push(recipe, sys.argv[2] or recipe.release.repo)
    except QwenQuantError as error:
        print(error_text(error), end="", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
