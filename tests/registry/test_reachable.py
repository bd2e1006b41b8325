from __future__ import annotations

from typing import Any

import pytest

from assay.errors import IntegrityError
from assay.files import canonical_json, sha256_bytes
from assay.registry.oci import INDEX_TYPE, MANIFEST_TYPE, Descriptor, describe
from assay.registry.reachable import named_in, reached


class Store:
    """Bytes by digest."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def put(self, value: Any, media_type: str) -> Descriptor:
        data = canonical_json(value)
        descriptor = describe(data, media_type)
        self.held[descriptor.digest] = data
        return descriptor

    def reached(self, *roots: Descriptor) -> set[str]:
        return reached(roots, lambda descriptor: self.held[descriptor.digest], lambda digest: digest in self.held)


def test_everything_that_is_led_to() -> None:
    store = Store()
    config, layer, loose = (store.put([name], "x") for name in ("config", "layer", "loose"))
    model = store.put({"config": config.to_json(), "layers": [layer.to_json()]}, MANIFEST_TYPE)
    about = store.put({"config": config.to_json(), "layers": [], "subject": model.to_json()}, MANIFEST_TYPE)
    index = store.put({"manifests": [about.to_json()]}, INDEX_TYPE)
    assert store.reached(index) == {found.digest for found in (index, about, model, config, layer)}
    assert store.reached(config, loose) == {config.digest, loose.digest}
    assert store.reached() == set()


def test_a_subject_in_another_registry_and_a_circle() -> None:
    store = Store()
    elsewhere = Descriptor(MANIFEST_TYPE, sha256_bytes(b"elsewhere"), 9)
    about = store.put({"subject": elsewhere.to_json()}, MANIFEST_TYPE)
    assert store.reached(about) == {about.digest}
    store.held[elsewhere.digest] = canonical_json({"manifests": [about.to_json()]})
    assert store.reached(about) == {about.digest, elsewhere.digest}


@pytest.mark.parametrize("value", [{"layers": {}}, {"layers": 1}, {"config": []}, {"manifests": [{"digest": "x"}]}, []])
def test_what_is_no_manifest(value: Any) -> None:
    with pytest.raises(IntegrityError, match="test"):
        named_in(canonical_json(value), "test")
