"""The YAML block at the top of a card, as the Hub reads it (https://huggingface.co/docs/hub/model-cards).

Made with huggingface_hub's own classes, so that what it writes is what it validates. A field that is not known is left
out, never filled with a guess.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qwen_quant.hub.card_facts import CardFacts, Described
from qwen_quant.hub.card_markdown import plain
from qwen_quant.hub.card_quality import dataset_name
from qwen_quant.hub.download import HUB_ID
from qwen_quant.recipe import BnbConfig
from qwen_quant.results import TaskResult, TextResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PIPELINE = "text-generation"
DIGITS = 6  # of a figure in model-index
# lm-evaluation-harness's metric -> the Hub's id of it, where that has one.
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "pass@1": "code_eval"}


def metadata_yaml(facts: CardFacts) -> str:
    """The block between the two lines of dashes, without them."""
    return block(facts, "transformers", _tags(facts), relation="quantized")


def block(facts: Described, library: str, tags: list[str], *, relation: str) -> str:
    """The block of a card of any kind; `relation` says what it is to its base model."""
    from huggingface_hub import ModelCardData

    source = facts.source
    results = _results(facts)
    data = ModelCardData(
        base_model=source.base_model or None,
        language=list(source.language) or None,
        library_name=library,
        license=source.license or None,
        license_name=source.license_name or None,
        license_link=source.license_link or None,
        pipeline_tag=source.pipeline_tag or PIPELINE,
        tags=tags,
        model_name=plain(facts.name) if results else None,
        eval_results=results or None,
        base_model_relation=relation if source.base_model and relation else None,
        quantized_by=facts.repo_id.split("/")[0] if facts.repo_id and relation else None,
    )
    return data.to_yaml()


def _tags(facts: CardFacts) -> list[str]:
    """Source's tags, then format, width, family and tool."""
    config = facts.made.config
    if isinstance(config, BnbConfig):
        own = ["bitsandbytes", config.quant_type, "8-bit" if config.quant_type == "int8" else "4-bit"]
    else:
        own = ["gptq", f"int{config.bits}", f"{config.bits}-bit"]
    family = [facts.model_type] if facts.model_type else []
    return list(dict.fromkeys([*facts.source.tags, *own, "quantized", *family, "qwen-quant"]))


def _results(facts: Described) -> list[EvalResult]:
    """Figures of the quantized model, finite ones only, grouped by dataset."""
    if facts.report is None:
        return []
    pipeline = facts.source.pipeline_tag or PIPELINE
    results = [row for text in facts.report.texts for row in _text_results(text, pipeline)]
    results += [_task_result(task, pipeline) for task in facts.report.tasks]
    return [row for row in results if math.isfinite(row.metric_value)]


def _dataset(text: TextResult) -> dict[str, Any]:
    """Hub data sets by id, configuration and split; other texts by name and hash."""
    kind, _, rest = text.dataset.partition(":")
    parts = rest.split(":")
    if kind == "hub" and HUB_ID.fullmatch(parts[0]):
        named = dict(zip(("dataset_config", "dataset_split"), (part for part in parts[1:3] if part), strict=False))
        return {"dataset_type": parts[0], "dataset_name": parts[0], **named}
    name = plain(dataset_name(text.dataset))
    return {"dataset_type": name.replace(":", "-"), "dataset_name": name, "dataset_revision": text.dataset_sha256}


def _text_results(text: TextResult, pipeline: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    protocol = {"window_tokens": text.window_tokens, "stride_tokens": text.stride_tokens, "tokens": text.tokens}
    figures = (
        ("perplexity", "Perplexity", text.perplexity.quantized),
        ("kl_divergence", "KL divergence from the source, nats per token", text.kl_mean.estimate),
        ("top1_agreement", "Same most likely token as the source", text.top1_agreement.estimate),
    )
    return [
        EvalResult(
            task_type=pipeline,
            metric_type=metric,
            metric_name=name,
            metric_value=_rounded(value),
            dataset_args=protocol,
            **_dataset(text),
        )
        for metric, name, value in figures
    ]


def _task_result(task: TaskResult, pipeline: str) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=pipeline,
        dataset_type=plain(task.task),
        dataset_name=plain(task.task),
        dataset_args={"num_few_shot": task.shots, "items": task.items},
        metric_type=_METRICS.get(task.metric, plain(task.metric)),
        metric_name=plain(task.metric),
        metric_value=_rounded(task.quantized),
    )


def _rounded(value: float) -> float:
    return round(value, DIGITS) if math.isfinite(value) else value
