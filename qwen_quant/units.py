"""Numbers for people: bytes, seconds and counts inside the program, units only when printed."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Bytes in binary units: 1536 -> "1.50 KiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.{1 if abs(value) >= 10 else 2}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds: 4.21 -> "4.2 s", 75 -> "1 min 15 s", 7260 -> "2 h 01 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: int) -> str:
    """A count: 1920 -> "1920", 28800 -> "28.8 k", 134515008 -> "134.5 M"."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= max(size, 10**4):
            return f"{count / size:.1f} {unit}"
    return str(count)
