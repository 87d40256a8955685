"""A Hugging Face Hub (and a ModelScope) on loopback, for tests: real requests, state on disk, faults on demand.

`serve_hub(root, mode="lfs" | "xet")` answers what huggingface_hub 2.4 asks (read from its sources), and
`serve_modelscope(root)` what modelscope-hub asks. The code under test runs as a process of its own with HF_ENDPOINT (or
MODELSCOPE_ENDPOINT) set; `hub.environment(home)` gives it.
"""

from tests.loophub.faults import Fault, FaultPlan
from tests.loophub.hub import Hub, serve_hub
from tests.loophub.modelscope import ModelScope, serve_modelscope

__all__ = ["Fault", "FaultPlan", "Hub", "ModelScope", "serve_hub", "serve_modelscope"]
