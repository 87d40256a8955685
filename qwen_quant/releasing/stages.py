"""The table of stages, in the order they run."""

from __future__ import annotations

from qwen_quant.releasing.making import BNB, DOWNLOAD, GPTQ
from qwen_quant.releasing.measuring import GATE, PROFILE, VALIDATE
from qwen_quant.releasing.publishing import CARD, EXPORT, PUSH
from qwen_quant.releasing.stage import Stage

STAGES: tuple[Stage, ...] = (DOWNLOAD, GPTQ, BNB, VALIDATE, PROFILE, GATE, EXPORT, CARD, PUSH)
