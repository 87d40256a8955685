"""Tests mirror the package. One thread each: on tensors this small, waking a second one costs more than it gives."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
