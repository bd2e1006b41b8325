from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.registry.reference import Reference, check_name, check_tag, is_version, parse_reference, split_ref_name

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("small", Reference("small", "latest", None)),
        ("small:v1.2", Reference("small", "v1.2", None)),
        (f"small@{DIGEST}", Reference("small", None, DIGEST)),
        (DIGEST, Reference(None, None, DIGEST)),
    ],
)
def test_every_form_is_read(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "small:",
        ":latest",
        "Small",
        "small:.x",
        "small@",
        "small@sha256:ab",
        f"small:v1@{DIGEST}",
        f"@{DIGEST}",
        DIGEST.upper(),
        "a/b",
        "../small",
        "small:a:b",
        "small\n",
        "small:latest\n",
        DIGEST + "\n",
        "x" * 101,
        "small:" + "t" * 129,
    ],
)
def test_other_forms_are_refused_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"Allowed: NAME, NAME:TAG, NAME@sha256:DIGEST or sha256:DIGEST"):
        parse_reference(text)


@given(st.text(max_size=140))
def test_a_reference_is_read_whole_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except UsageError:
        return
    assert str(reference) in (text, f"{text}:latest")


@pytest.mark.parametrize("tag", ["1", "v1", "1.2.0", "v1.2", "1.2.0-rc1", "2026.11", "1_2"])
def test_versions(tag: str) -> None:
    assert is_version(tag)


@pytest.mark.parametrize("tag", ["latest", "staging", "production", "4bit", "vx", "v", "rc1", "main-1.2", "v.1"])
def test_moving_tags(tag: str) -> None:
    assert not is_version(tag)


def test_names_and_tags_are_checked() -> None:
    check_name("small-v2.q4_1")
    check_tag("1.2.0-rc1")
    with pytest.raises(UsageError, match="cannot name an artifact"):
        check_name("-small")
    with pytest.raises(UsageError, match="cannot be a tag"):
        check_tag("a b")


def test_tags_of_other_tools_are_not_ours() -> None:
    assert split_ref_name("small:latest") == ("small", "latest")
    assert split_ref_name("latest") is None
    assert split_ref_name("docker.io/library/x:latest") is None
