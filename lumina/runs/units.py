"""Numbers as a person reads them."""


def si(value: float) -> str:
    """Three significant digits with a decimal prefix: 21.5 K, 4.00 M, 1.59 T."""
    for prefix in ("", " K", " M", " B", " T", " P", " E"):
        if abs(value) < 999.5 or prefix == " E":
            return f"{value:.3g}" if not prefix else f"{_three(value)}{prefix}"
        value /= 1000
    raise AssertionError


def flops_per_second(value: float) -> str:
    """461 GFLOP/s."""
    return si(value).replace(" B", " G") + "FLOP/s"


def gib(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 1023.5 * 2**20 else f"{_three(count / 2**30)} GiB"


def decimal_bytes(count: float) -> str:
    """Bytes in powers of ten, as file sizes are told: 999 B, 12.3 kB, 1,234.5 MB."""
    if count < 999.5:
        return f"{count:.0f} B"
    return f"{count / 1e3:.1f} kB" if count < 999_950 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """2:05, 1:02:03, 3 d 4 h."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes.zfill(5)}" if whole >= 3600 else minutes


def _three(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
