"""Lossless export: the codes, scales and zeros of an artifact in another runtime's own format, and the proof of it.

Nothing is quantized again.  The rooms:

- `pivot.py`: one linear on its way, its codes still packed, and the only conversions of packed codes;
- `source.py`: `ExportSource`, any Int4 folder (ours, GPTQ v1/v2, AWQ, compressed-tensors) linear by linear;
- `formats.py`: `Format`, what a format must provide, and the table `FORMATS`;
- one file a format (`gptq.py`, `awq.py`, `compressed_tensors.py`, `dense.py`, ...), both directions where both exist;
- `folder.py`: what the formats that are safetensors folders share;
- `decoder.py`: what the graph formats share; `hybrid.py`: how other runtimes store linear attention;
- `behind.py`: writing in a thread of its own, so that the next tensor is made meanwhile;
- `verify.py`: reads the written files back and compares every value with the source;
- `export.py`: `export_artifact`, one run from start to end.

A new format is one file with one `Format` in it, and one line in `formats.LOCATIONS`.
"""
