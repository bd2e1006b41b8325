from __future__ import annotations

from pathlib import Path

import pytest
from fake_powercap import fake_powercap, set_counter

from assay_evals.speed.energy import find_counters

SERVER = {
    "intel-rapl:0": ("package-0", 1_000_000, 9_000_000),
    "intel-rapl:0:0": ("core", 500_000, 9_000_000),
    "intel-rapl:0:1": ("dram", 200_000, 5_000_000),
    "intel-rapl:1": ("package-1", 7_000_000, 9_000_000),
    "intel-rapl:2": ("psys", 100, 9_000_000),
    "intel-rapl-mmio:0": ("package-0", 1_000_000, 9_000_000),
    "dtpm": ("package-9", 0, 1),
}


def test_packages_and_their_memory_are_counted_once(tmp_path: Path) -> None:
    root = fake_powercap(tmp_path, SERVER)
    counters = find_counters(root)
    assert counters.said == "RAPL: package-0, dram, package-1"
    before = counters.read()
    for directory, (_, start, _) in SERVER.items():
        set_counter(root, directory, start + 300_000)
    assert counters.joules_since(before) == pytest.approx(0.9)


def test_a_counter_that_starts_again_goes_on_counting(tmp_path: Path) -> None:
    root = fake_powercap(tmp_path, {"intel-rapl:0": ("package-0", 8_750_000, 9_000_000)})
    counters = find_counters(root)
    before = counters.read()
    set_counter(root, "intel-rapl:0", 250_000)
    assert counters.joules_since(before) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("zones", "said"),
    [
        ({}, "This machine shows no energy counters: {root} has no intel-rapl package."),
        (
            {"intel-rapl:0:0": ("core", 5, 10)},
            "This machine shows no energy counters: {root} has no intel-rapl package.",
        ),
        (
            {"intel-rapl:0:0": ("dram", 5, 10)},
            "This machine shows no energy counters: {root} has no intel-rapl package.",
        ),
    ],
    ids=["no directory", "a part alone", "memory alone"],
)
def test_where_nothing_counts_it_says_so(tmp_path: Path, zones: dict[str, tuple[str, int, int]], said: str) -> None:
    fake_powercap(tmp_path, zones)
    root = tmp_path / "powercap"
    counters = find_counters(root)
    assert counters.zones == ()
    assert counters.said == said.format(root=root)
    assert counters.joules_since(counters.read()) is None


@pytest.mark.parametrize("spoiled", ["energy_uj", "max_energy_range_uj", "name"])
def test_a_zone_that_cannot_be_read_counts_for_none(tmp_path: Path, spoiled: str) -> None:
    """The others alone would be too few joules."""
    root = fake_powercap(tmp_path, SERVER)
    (root / "intel-rapl:1" / spoiled).unlink()
    counters = find_counters(root)
    assert counters.zones == ()
    assert counters.said.startswith(f"The energy counters below {root} cannot be read: ")
    assert spoiled in counters.said


def test_what_is_no_number_is_no_counter(tmp_path: Path) -> None:
    root = fake_powercap(tmp_path, SERVER)
    (root / "intel-rapl:0" / "energy_uj").write_text("many")
    assert "invalid literal" in find_counters(root).said


def test_a_counter_for_root_alone_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux has it since 2020: readable by root only."""
    root = fake_powercap(tmp_path, SERVER)
    path = root / "intel-rapl:0" / "energy_uj"
    read = Path.read_text

    def refusing(self: Path, **options: str) -> str:
        # Root, who may run the tests, may read everything.
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return read(self, **options)

    monkeypatch.setattr(Path, "read_text", refusing)
    counters = find_counters(root)
    assert counters.zones == ()
    assert counters.said == f"{path} may not be read; let this user read it (chmod a+r, as root)."
