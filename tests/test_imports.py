"""Imports go only downward in this list, and the words at its top need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qwen_quant"
# One row a level; a module may import its own level and those above. A new module needs a place here.
LEVELS = (
    ("__init__", "errors", "units", "progress", "recipe", "results", "environment", "process", "background"),
    ("data", "checkpoint", "chat", "qwen1_tokenizer", "qwen1_fast", "qwen1_auto", "tokenizer", "calibration"),
    ("grid", "factor", "hessian", "gptq", "packing", "bnb"),
    (
        "kv_schemes",
        "kv_cache",
        "models",
        "runtime",
        "activations",
        "block_solver",
        "experts",
        "block",
        "memory",
        "resume",
    ),
    (
        "preparation",
        "plan",
        "sequential",
        "bnb_plan",
        "bnb_convert",
        "evaluation",
        "tasks",
        "inspection",
        "qwen1_to_qwen2",
        "convert",
        "hub",
        "profile",
        "profiling",
        "export",
        "signing",
        "verify",
    ),
    ("releasing", "release"),
    ("console", "commands", "cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imported(path: Path) -> set[str]:
    """First-level names of qwen_quant that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "qwen_quant" else str(node.module)
                for alias in node.names
            ]
        found |= {name.split(".")[1] for name in names if name.startswith("qwen_quant.")}
    return {name if name in LEVEL else "__init__" if name == "__version__" else name for name in found}


def test_imports_go_only_downward() -> None:
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in LEVEL, f"qwen_quant/{own}: give it a place in LEVELS"
        upward += [f"{path.name} imports {name}" for name in imported(path) if LEVEL[name] > LEVEL[own]]
    assert not upward


def test_the_command_needs_no_torch_to_start() -> None:
    """`qwen-quant --help` loads nothing heavy; a program that imports the package gets the model registered instead."""
    command = [sys.executable, "-X", "importtime", "-m", "qwen_quant", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qwen_quant.commands.gptq" in loaded and not loaded & {"torch", "transformers", "numpy"}
