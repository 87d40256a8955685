"""`qwen-quant plan`: what a run would need, from timing one real block."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, running, show
from qwen_quant.results import to_json


def plan(
    model: options.Model = None,
    out: options.Out = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    sym: options.Sym = None,
    asymmetric_calibration: options.AsymmetricCalibration = None,
    calibration: options.Calibration = None,
    num_samples: options.NumSamples = None,
    seq_len: options.SeqLen = None,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict peak memory, disk, output size and time of `qwen-quant gptq` on this machine.

    One block of MODEL is read and timed; nothing is written. OUT only says on which disk the result would lie.

    \b
    Examples:
      qwen-quant plan ./Qwen2.5-7B
      qwen-quant plan ./Qwen2.5-7B /data/out --num-samples 256 --seq-len 2048
      qwen-quant plan ./Qwen2.5-7B --no-asymmetric-calibration --json
    """
    output = Output(json=json, quiet=quiet)
    recipe = options.project_recipe(output)
    recipe = dataclasses.replace(
        recipe,
        gptq=options.override(
            recipe.gptq, bits=bits, group_size=group_size, sym=sym, asymmetric_calibration=asymmetric_calibration
        ),
        calibration=options.override(recipe.calibration, source=calibration, num_samples=num_samples, seq_len=seq_len),
        run=options.override_run(recipe.run, device=device),
    )
    name = options.required(model or recipe.model, "model")
    source = options.find_model(name, output)
    target = Path(out or recipe.out or f"{source.source_id.rpartition('/')[2]}-Int{recipe.gptq.bits}")

    from qwen_quant.plan import make_plan

    with running(output):
        estimate = make_plan(options.make_job(recipe, source, target))
    show(Report("plan", to_json(estimate), tuple(estimate.lines)), output)
