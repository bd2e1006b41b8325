import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch

from assay.errors import IntegrityError
from assay.quantize.schemes import WeightScheme
from assay.quantize.store import LayerStore, QuantizedLayer, QuantizedModule
from assay.quantize.weights import QuantizedWeight

SCHEMES = [
    WeightScheme("W4A16", 4, True, 5),
    WeightScheme("W4A16_ASYM", 4, False, 5),
    WeightScheme("W8A16", 8, True, 0),
]


def module(scheme: WeightScheme, error: float | None = 0.125, damping: float | None = 0.01) -> QuantizedModule:
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = scheme.groups(15)
    codes = torch.randint(0, 2**scheme.bits, (4, 15), generator=generator, dtype=torch.uint8)
    points = torch.randint(0, 16, (4, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(4, groups, generator=generator)
    return QuantizedModule(QuantizedWeight(scheme, codes, scales, None if scheme.symmetric else points), error, damping)


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "layers")


def written(store: LayerStore) -> Path:
    store.write(3, QuantizedLayer({f"model.layers.3.{scheme.name}": module(scheme) for scheme in SCHEMES}))
    return store.path(3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("error", "damping"), [(0.125, 0.01), (None, None)])
def test_what_is_read_is_what_was_written(
    store: LayerStore, scheme: WeightScheme, error: float | None, damping: float | None
) -> None:
    before = module(scheme, error, damping)
    store.write(0, QuantizedLayer({"one": before, "two": module(scheme)}))
    after = store.read(0).modules
    assert list(after) == ["one", "two"]
    found = after["one"]
    assert (found.relative_error, found.damping) == (error, damping)
    assert found.weight.scheme == scheme
    for name in ("codes", "scales", "zero_points"):
        wanted, got = getattr(before.weight, name), getattr(found.weight, name)
        assert (wanted is None) == (got is None)
        assert wanted is None or (torch.equal(got, wanted) and got.dtype == wanted.dtype)


def test_rows_of_a_larger_weight_can_be_stored(store: LayerStore) -> None:
    whole = module(SCHEMES[1])
    store.write(0, QuantizedLayer({"part": dataclasses.replace(whole, weight=whole.weight.rows(1, 3))}))
    assert torch.equal(store.read(0).modules["part"].weight.codes, whole.weight.codes[1:3])


def test_a_layer_without_modules_is_a_finished_layer(store: LayerStore) -> None:
    store.write(0, QuantizedLayer({}))
    assert store.holds(0)
    assert len(store.read(0).modules) == 0


def test_the_same_modules_give_the_same_bytes_for_everyone_to_read(store: LayerStore) -> None:
    path = written(store)
    first = path.read_bytes()
    assert written(store).read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["layer-0003.safetensors"]


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_damaged(store: LayerStore, kept: float) -> None:
    path = written(store)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(IntegrityError, match=r"layer-0003.safetensors: damaged .* remove it and run again"):
        dict(store.read(3).modules)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"layer": "not JSON"},
        {"layer": json.dumps({"modules": {"m": {}}, "notes": []})},
        {"layer": json.dumps({"modules": {"m": {"scheme": {"bits": 4}, "in_features": 1}}, "notes": []})},
    ],
    ids=["none", "empty", "not JSON", "no facts", "half a scheme"],
)
def test_a_file_without_its_facts_is_damaged(store: LayerStore, metadata: dict[str, str] | None) -> None:
    path = written(store)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(IntegrityError, match="damaged"):
        dict(store.read(3).modules)


def test_a_write_that_fails_leaves_the_last_whole_file(store: LayerStore) -> None:
    path = written(store)
    before = path.read_bytes()
    good = module(SCHEMES[1])
    unstorable = dataclasses.replace(good.weight, scales=torch.empty(4, 3, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        store.write(3, QuantizedLayer({"m": dataclasses.replace(good, weight=unstorable)}))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert not store.holds(4)
