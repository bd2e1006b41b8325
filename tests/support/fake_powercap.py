"""A /sys/class/powercap to order, for machines without counters and for counters that do what real ones seldom do."""

from __future__ import annotations

from pathlib import Path


def fake_powercap(root: Path, zones: dict[str, tuple[str, int, int]]) -> Path:
    """zones: directory → name, microjoules counted so far, and the range after which the counter starts again."""
    powercap = root / "powercap"
    for directory, (name, microjoules, most) in zones.items():
        zone = powercap / directory
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{most}\n")
        set_counter(powercap, directory, microjoules)
    return powercap


def set_counter(powercap: Path, directory: str, microjoules: int) -> None:
    (powercap / directory / "energy_uj").write_text(f"{microjoules}\n")
