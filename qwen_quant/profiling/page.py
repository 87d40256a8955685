"""profile.html: the tables and plots of a profile as one self-contained page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_quant.evaluation.report_numbers import escaped
from qwen_quant.evaluation.report_style import STYLE
from qwen_quant.profiling.plots import charts, figures, standalone
from qwen_quant.profiling.png import write_pngs
from qwen_quant.profiling.protocol import ProfileConfig
from qwen_quant.profiling.results import ProfileResult, write_profile
from qwen_quant.profiling.tables import TextTable, tables
from qwen_quant.units import format_bytes, format_seconds

JSON_FILE, PAGE_FILE = "profile.json", "profile.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_outputs(result: ProfileResult, folder: Path, *, png: bool = False) -> tuple[Path, ...]:
    """Write the plots, the page and, last, profile.json into `folder` (made where absent); returns what was written.

    `png` draws each plot as PNG too. Errors: InputError where that lacks matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = charts(result)
    drawn = figures(shown)
    files = {f"{name}.svg": standalone(figure) for name, figure in drawn.items()}
    files[PAGE_FILE] = render_page(result, list(drawn.values()))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    pictures = write_pngs(shown, folder) if png else ()
    write_profile(result, folder / JSON_FILE)
    return (*(folder / name for name in files), *pictures, folder / JSON_FILE)


def protocol_lines(result: ProfileResult) -> tuple[str, ...]:
    """How it was measured, one fact a line."""
    config = result.config
    where = f"{result.device_name}, {result.device}" + (f", {result.threads} threads" if result.threads else "")
    dtype = "dtypes: see the kernels" if config.dtype == "auto" else f"dense weights and activations in {config.dtype}"
    rate = result.bandwidth_bytes_per_second
    lines = [
        f"on: {where}; {dtype}",
        "protocol: context + new tokens, length enforced, tokens/s over all new tokens; "
        f"{_runs(config)}, "
        "the median shown; every cell in a fresh process",
    ]
    if rate:
        lines.append(
            f"roofline: the bytes that one decoding step must read, over the {format_bytes(rate)}/s that this machine "
            "was measured to read"
        )
    lines += [f"kernel: {name}: {kernel}" for name, kernel in _kernels(result).items()]
    lines += [
        f"torch.compile: {m.model}, {m.cell.label}: {format_seconds(m.compile_seconds)} to compile, not timed"
        for m in result.measurements
        if m.compile_seconds is not None
    ]
    if any(m.extrapolated for m in result.measurements):
        lines.append("~ extrapolated: --max-seconds stopped the generation early (see the warnings)")
    sources = {m.speed.energy_source for m in result.measurements if m.speed and m.speed.joules_per_token is None}
    lines += [f"energy: {source}" for source in sorted(sources)]
    return tuple(lines)


def _runs(config: ProfileConfig) -> str:
    """ "up to 3 runs of each cell after 8 warm-up tokens"."""
    count = f"{config.runs} run{'s' if config.runs > 1 else ''} of each cell"
    before = "compiling" if config.compile else f"{config.warmup_tokens} warm-up tokens"
    return f"{'up to ' if config.max_seconds and config.runs > 1 else ''}{count} after {before}"


def _kernels(result: ProfileResult) -> dict[str, str]:
    return {m.model: m.kernel for m in result.measurements if m.kernel}


def render_page(result: ProfileResult, drawn: Sequence[str]) -> str:
    """The page as text; `drawn` are its <figure>s."""
    names = " and ".join(model.name for model in result.models)
    warnings = "".join(f"<li>{escaped(text)}</li>" for text in result.warnings)
    lines = "".join(f"<p>{escaped(line)}</p>" for line in protocol_lines(result))
    models = "".join(
        f"<p>{escaped(m.name)}: {escaped(m.kind)}, {format_bytes(m.stored_bytes)} on disk</p>" for m in result.models
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Profile of {escaped(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Speed and memory of {escaped(names)}</h1>\n{models}\n"
        + (f'<ul class="warnings">{warnings}</ul>\n' if warnings else "")
        + "".join(_table(table) for table in tables(result))
        + (f'<div class="plots">{"".join(drawn)}</div>\n' if drawn else "")
        + f"<h2>How it was measured</h2>\n{lines}\n"
        + f'<p class="note">measured in {escaped(format_seconds(result.seconds))}</p>\n</body>\n</html>\n'
    )


def _table(table: TextTable) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=' + chr(34) + 'text' + chr(34) if i < table.text_columns else ''}>{escaped(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f'<h2>{escaped(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{cells("th", table.columns)}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>\n"
    )
