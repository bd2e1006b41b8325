"""Joules that the processor says it took: the RAPL counters that Linux shows under /sys/class/powercap.

Counted are the packages, and the memory beside them where it has a counter of its own. Left out on purpose: `core` and `uncore`, which are
parts of a package, `psys` and `intel-rapl-mmio`, which count the same once more. A counter counts for the whole machine, whoever works on
it, and starts again from zero after `max_energy_range_uj`; that it did so twice within one request cannot be seen.
Source: Linux, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PACKAGE, _PART = re.compile(r"intel-rapl:\d+"), re.compile(r"intel-rapl:\d+:\d+")


@dataclass(frozen=True)
class Zone:
    """One counter: its directory, what it counts, and the microjoules after which it starts again."""

    directory: Path
    name: str
    range_microjoules: int

    def microjoules(self) -> int:
        return _number(self.directory / "energy_uj")


@dataclass(frozen=True)
class Counters:
    """Everything that is counted; without zones, `said` is the sentence that tells why."""

    zones: tuple[Zone, ...]
    said: str

    def read(self) -> tuple[int, ...]:
        return tuple(zone.microjoules() for zone in self.zones)

    def joules_since(self, earlier: tuple[int, ...]) -> float | None:
        """Joules since an earlier `read`; None where nothing counts."""
        if not self.zones:
            return None
        taken = [now - before for now, before in zip(self.read(), earlier, strict=True)]
        microjoules = sum(
            count if count >= 0 else count + zone.range_microjoules
            for count, zone in zip(taken, self.zones, strict=True)
        )
        return microjoules / 1e6


def find_counters(root: Path = POWERCAP) -> Counters:
    """The counters below a powercap directory: all that belong together, or none."""
    zones: list[Zone] = []
    try:
        for directory in sorted(root.iterdir()) if root.is_dir() else ():
            if not (_PACKAGE.fullmatch(directory.name) or _PART.fullmatch(directory.name)):
                continue
            name = (directory / "name").read_text(encoding="utf-8").strip()
            whole = _PACKAGE.fullmatch(directory.name) and name.startswith("package")
            if whole or (_PART.fullmatch(directory.name) and name == "dram"):
                zone = Zone(directory, name, _number(directory / "max_energy_range_uj"))
                zone.microjoules()
                zones.append(zone)
    except PermissionError as error:
        return Counters((), f"{error.filename} may not be read; let this user read it (chmod a+r, as root).")
    except (OSError, ValueError) as error:
        return Counters((), f"The energy counters below {root} cannot be read: {error}.")
    if not any(zone.name.startswith("package") for zone in zones):
        return Counters((), f"This machine shows no energy counters: {root} has no intel-rapl package.")
    return Counters(tuple(zones), f"RAPL: {', '.join(zone.name for zone in zones)}")


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
