"""Our own tasks for lm-evaluation-harness 0.4.13: YAML files here, one module of functions for each kind.

A runner gives `FOLDER` to `lm_eval.tasks.TaskManager(include_path=...)` and sets the environment variables of
`rows.py`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the YAML files are."""
