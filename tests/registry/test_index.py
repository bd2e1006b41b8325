from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import IntegrityError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.registry.index import Index, Named, parse_index
from assay.registry.oci import MANIFEST_TYPE, Descriptor
from assay.registry.reference import is_version, parse_reference


def model(text: str) -> Descriptor:
    return Descriptor(MANIFEST_TYPE, sha256_bytes(text.encode()), 1)


def publish(index: Index, name: str, tags: list[str], text: str, *, note: str = "", force: bool = False) -> Named:
    evidence = model(f"evidence of {text} {note}")
    return index.publish(name, tags, model(text), [evidence], force=force, where="here")


def tags_of(index: Index) -> dict[tuple[str, str | None], str]:
    return {(name, tag): descriptor.digest for name, tag, descriptor in index.models()}


def test_the_first_publish() -> None:
    change = publish(Index(), "small", ["latest", "1.0"], "one")
    assert (change.model_is_new, change.tags_set, bool(change.attached)) == (True, ("latest", "1.0"), True)
    assert tags_of(change.index) == {("small", "latest"): model("one").digest, ("small", "1.0"): model("one").digest}
    assert [found.digest for found in change.index.referrers(model("one").digest)] == [model("evidence of one ").digest]


def test_the_same_again_changes_nothing() -> None:
    first = publish(Index(), "small", ["latest"], "one").index
    change = publish(first, "small", ["latest", "latest"], "one")
    assert change == Named(first, False, (), ())


def test_new_evidence_is_added_and_old_evidence_stays() -> None:
    first = publish(Index(), "small", ["latest"], "one").index
    change = publish(first, "small", ["latest"], "one", note="again")
    assert (change.model_is_new, change.tags_set, bool(change.attached)) == (False, (), True)
    assert len(change.index.referrers(model("one").digest)) == 2


def test_a_moving_tag_moves_and_what_it_left_stays_reachable() -> None:
    index = publish(publish(Index(), "small", ["latest"], "one").index, "small", ["latest"], "two").index
    assert tags_of(index) == {("small", None): model("one").digest, ("small", "latest"): model("two").digest}
    assert index.resolve(parse_reference(f"small@{model('one').digest}"), "here").digest == model("one").digest
    back = publish(index, "small", ["latest"], "one").index
    assert tags_of(back) == {("small", None): model("two").digest, ("small", "latest"): model("one").digest}


def test_a_version_does_not_move_without_force() -> None:
    index = publish(Index(), "small", ["1.0"], "one").index
    with pytest.raises(UsageError, match="versions do not move"):
        publish(index, "small", ["latest", "1.0"], "two")
    forced = publish(index, "small", ["1.0"], "two", force=True)
    assert forced.tags_set == ("1.0",)
    assert tags_of(forced.index)[("small", "1.0")] == model("two").digest


def test_without_tags_the_digest_alone_leads_to_a_model() -> None:
    change = publish(Index(), "small", [], "one")
    assert change.model_is_new
    assert tags_of(change.index) == {("small", None): model("one").digest}
    assert publish(change.index, "small", [], "one").index == change.index


def test_names_are_apart() -> None:
    index = publish(publish(Index(), "small", ["1.0"], "one").index, "large", ["1.0"], "one").index
    assert tags_of(index) == {("small", "1.0"): model("one").digest, ("large", "1.0"): model("one").digest}
    with pytest.raises(UsageError, match=r"there is no small:2\.0\. Tags of small: 1\.0\."):
        index.resolve(parse_reference("small:2.0"), "here")
    with pytest.raises(UsageError, match=r"Names here: large, small\."):
        index.resolve(parse_reference("medium"), "here")
    only_small = publish(Index(), "small", ["1.0"], "one").index
    with pytest.raises(UsageError):
        only_small.resolve(parse_reference(f"large@{model('one').digest}"), "here")
    with pytest.raises(UsageError, match="Nothing is published here"):
        Index().resolve(parse_reference("small"), "here")


def test_evidence_cannot_be_pulled_as_a_model() -> None:
    index = publish(Index(), "small", ["1.0"], "one").index
    with pytest.raises(UsageError):
        index.resolve(parse_reference(model("evidence of one ").digest), "here")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["small", "large"]),
        st.lists(st.sampled_from(["latest", "staging", "1.0", "v2"]), max_size=3),
        st.sampled_from(["one", "two", "three"]),
        st.booleans(),
    ),
    max_size=12,
)


@given(STEPS)
def test_no_order_of_publishes_loses_anything(steps: list[tuple[str, list[str], str, bool]]) -> None:
    index, tags, published = Index(), dict[tuple[str, str], str](), set[tuple[str, str]]()
    for name, step_tags, text, force in steps:
        moves = [tag for tag in step_tags if tags.get((name, tag), text) != text and is_version(tag)]
        if moves and not force:
            with pytest.raises(UsageError):
                publish(index, name, step_tags, text)
            continue
        index = publish(index, name, step_tags, text, force=force).index
        tags |= {(name, tag): text for tag in step_tags}
        published.add((name, text))
    assert {key: model(text).digest for key, text in tags.items()} == {
        key: digest for key, digest in tags_of(index).items() if key[1]
    }
    for name, text in published:
        assert index.resolve(parse_reference(f"{name}@{model(text).digest}"), "here").digest == model(text).digest
        assert len(index.referrers(model(text).digest)) == 1
    models = [(name, tag, found.digest) for name, tag, found in index.models()]
    assert len(models) == len(set(models))
    assert parse_index(index.to_bytes(), "here") == index


def test_entries_of_other_tools_are_kept_as_they_are() -> None:
    foreign = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": sha256_bytes(b"x"),
        "size": 1,
        "platform": {"os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": "v1"},
    }
    index = parse_index(canonical_json({"schemaVersion": 2, "manifests": [foreign]}), "here")
    after = parse_index(publish(index, "small", ["latest"], "one").index.to_bytes(), "here")
    assert after.entries[0].raw == foreign
    assert [name for name, _, _ in after.models()] == ["small"]


def test_a_reference_that_names_two_artifacts_is_refused() -> None:
    entries = [publish(Index(), "small", ["latest"], text).index.entries[0] for text in ("one", "two")]
    with pytest.raises(IntegrityError, match="names 2 different artifacts"):
        Index(tuple(entries)).resolve(parse_reference("small"), "here")


@pytest.mark.parametrize(
    "value",
    [{}, {"schemaVersion": 1, "manifests": []}, {"schemaVersion": 2}, {"schemaVersion": 2, "manifests": [1]}],
)
def test_damaged_indexes_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(IntegrityError):
        parse_index(canonical_json(value), "here")
