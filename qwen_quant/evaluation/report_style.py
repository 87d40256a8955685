"""The style sheet of report.html: light and dark by the reader's own preference, and a form for paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2128; --soft: #57606a; --line: #d4dae0; --panel: #f4f6f8;
  --good: #176334; --bad: #ad2218; --warn: #805000; --baseline: #57606a; --quantized: #1659b7; --rounding: #b35900; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e4e8ec; --soft: #a0aab4; --line: #343c45; --panel: #1d232a;
    --good: #6fd38f; --bad: #ff9389; --warn: #efba55; --baseline: #b3bcc5; --quantized: #7fb2ff;
    --rounding: #f5a353; } }
* { box-sizing: border-box; }
html { background: var(--paper); }
body { max-width: 1080px; margin: 0 auto; padding: 28px 24px 56px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6em; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 40px 0 8px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1em; margin: 20px 0 4px; overflow-wrap: anywhere; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.soft, .note { color: var(--soft); }
.note { font-size: 0.87em; }
.verdict { margin: 18px 0; padding: 12px 18px; border: 1px solid var(--line); border-left: 6px solid var(--soft);
  border-radius: 6px; background: var(--panel); }
.verdict > p:first-child { font-size: 1.15em; font-weight: 600; margin: 0 0 6px; }
.verdict ul, .warnings { margin: 6px 0; padding-left: 20px; }
.verdict li, .warnings li { overflow-wrap: anywhere; }
.verdict.good { border-left-color: var(--good); } .verdict.good > p:first-child { color: var(--good); }
.verdict.bad { border-left-color: var(--bad); } .verdict.bad > p:first-child { color: var(--bad); }
.verdict.warn { border-left-color: var(--warn); } .verdict.warn > p:first-child { color: var(--warn); }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.93em; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6.5em; }
.stack td:first-child { min-width: 11em; } .stack td:last-child { min-width: 13em; }
tr.good td:last-child { color: var(--good); }
tr.bad td:last-child, tr.loss td:last-child { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 16px 28px; margin: 12px 0; }
figure { margin: 0; max-width: 560px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 2px; overflow-wrap: anywhere; }
.legend { margin: 2px 0; font-size: 0.87em; color: var(--soft); }
.key { display: inline-block; margin-right: 16px; white-space: nowrap; }
.key svg { vertical-align: -1px; margin-right: 6px; }
svg.plot { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.label { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.axis, .tick { stroke: var(--soft); stroke-width: 1; }
.grid { stroke: var(--line); stroke-width: 1; }
.zero { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.curve { fill: none; stroke-width: 1.8; }
.whisker { stroke-width: 2; }
.baseline { stroke: var(--baseline); } .quantized { stroke: var(--quantized); } .rounding { stroke: var(--rounding); }
.good-mark { stroke: var(--good); } .bad-mark { stroke: var(--bad); }
.curve.baseline, .curve.rounding { stroke-dasharray: 5 3; }
.dot { stroke-width: 1.4; }
.dot.baseline, .dot.rounding { fill: var(--paper); } .dot.quantized { fill: var(--quantized); }
.dot.good-mark { fill: var(--good); } .dot.bad-mark { fill: var(--bad); }
.case { margin: 14px 0; padding: 10px 16px 12px; border: 1px solid var(--line); border-radius: 6px; }
.case h3 { margin-top: 0; }
.case.bad { border-color: var(--bad); } .case .failure { color: var(--bad); font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 4px 20px; }
.answers > div { min-width: 0; }
pre { margin: 2px 0 8px; padding: 8px 10px; background: var(--panel); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 10px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { body { padding: 18px 14px 40px; font-size: 14px; }
  table { font-size: 0.88em; } th, td { padding: 4px 3px; } th:last-child, td:last-child { padding-right: 0; }
  td { white-space: normal; } .verdict { padding: 10px 12px; }
  .stack, .stack tbody, .stack tr, .stack td { display: block; } .stack thead { display: none; }
  .stack tr { padding: 6px 0; border-bottom: 1px solid var(--line); }
  .stack td { padding: 0; border: 0; text-align: left; min-width: 0 !important; }
  .stack td:first-child { font-weight: 600; }
  .stack td:empty { display: none; }
  .stack td:not(:first-child)::before { content: attr(data-label) ": "; color: var(--soft); font-weight: 400; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } h2, h3, figcaption { break-after: avoid; }
  h2 + p { break-after: avoid; }
  figure, tr, .verdict, .answers > div { break-inside: avoid; }
  pre { border: 1px solid var(--line); } .scroll { overflow: visible; }
  .verdict { print-color-adjust: exact; } table { font-size: 0.85em; } th, td { padding: 2px 7px; } }
"""
