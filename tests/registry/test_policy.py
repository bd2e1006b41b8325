from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from assay.errors import RecipeError, SignatureError
from assay.registry.keys import PublicKey, write_key_pair
from assay.registry.policy import Identity, PolicyFile, load_policy

POLICY = """\
version: 1
signers:
  ci: {file: ci.pub}
  release:
    pem: |
{pem}
  cloud: {identity: "https://github.com/org/models/.github/workflows/x.yml@refs/heads/main", issuer: "https://token.example"}
rules:
  - names: [small, "llm-*"]
    require:
      - {type: test-result, signers: [ci, release], threshold: 2}
      - {type: provenance, signers: [cloud]}
    channels:
      production: {signers: [release]}
  - names: ["*"]
    require:
      - {type: test-result, signers: [ci]}
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write policy.yaml with two keys beside it; pairs of texts are replaced in it."""
    for name in ("ci", "release"):
        write_key_pair(tmp_path / name, "ed25519", None)
    pem = "".join(f"      {line}\n" for line in (tmp_path / "release.pub").read_text().splitlines())

    def make(*changes: tuple[str, str]) -> Path:
        text = POLICY.replace("{pem}", pem.rstrip("\n"))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "policy.yaml").write_text(text)
        return tmp_path / "policy.yaml"

    return make


def problems(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as wrong:
        load_policy(path)
    assert wrong.value.exit_code == 2
    return [f"{problem.line}: {problem.message}" for problem in wrong.value.problems]


def test_a_policy_is_read(write: Write) -> None:
    policy = load_policy(write())
    ci, release, cloud = (policy.signers[name] for name in ("ci", "release", "cloud"))
    assert isinstance(ci, PublicKey) and isinstance(release, PublicKey) and ci.key_id != release.key_id
    assert isinstance(cloud, Identity) and cloud.issuer == "https://token.example"
    assert policy.rule_for("small") is policy.rule_for("llm-7b") is policy.rules[0]
    assert policy.rule_for("other") is policy.rules[1]


def test_a_name_without_a_rule_is_not_trusted(write: Write) -> None:
    policy = load_policy(write(('names: ["*"]', "names: [other]")))
    with pytest.raises(SignatureError, match=r"no rule is about 'small2' \(rules: small, llm-\*, other\)"):
        policy.rule_for("small2")


def test_the_digest_is_of_what_is_said(write: Write, tmp_path: Path) -> None:
    first = load_policy(write())
    assert load_policy(write(("version: 1\n", "version: 1  # a comment\n\n"))).digest == first.digest
    assert load_policy(write(("threshold: 2", "threshold: 1"))).digest != first.digest
    for name in ("ci", "ci.pub"):
        (tmp_path / name).unlink()
    write_key_pair(tmp_path / "ci", "ed25519", None)
    assert load_policy(write()).digest != first.digest


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1", "version: 2", "1: version is 2; allowed: 1."),
        ("type: provenance", "type: sbom", "14: rules.0.require.1.type is 'sbom'"),
        ("    channels:", "    chanels:", "15: unknown key 'chanels' (did you mean 'channels'?)"),
        ("threshold: 2", "threshold: 3", "13: threshold is 3, but 2 may sign"),
        ("threshold: 2", "threshold: 0", "13: rules.0.require.0.threshold is 0"),
        ("signers: [cloud]}", "signers: [clud]}", "14: there is no signer 'clud'; signers has: ci, cloud, release."),
        ("signers: [cloud]}", "signers: []}", "14: rules.0.require.1.signers is empty"),
        ("signers: [ci, release]", "signers: [ci, ci]", "13: ci is there already"),
        ("type: provenance", "type: test-result", "14: test-result is asked for already"),
        ("{signers: [release]}", "{signers: [nobody]}", "16: there is no signer 'nobody'"),
        ("ci: {file: ci.pub}", "ci: {file: ci.pub, identity: x}", "3: signers.ci needs exactly one of: file, pem, id"),
        ("ci: {file: ci.pub}", "ci: {}", "3: signers.ci needs exactly one of: file, pem, identity."),
        ("ci: {file: ci.pub}", "ci: {identity: x}", "3: signers.ci: identity and issuer belong together"),
        ("ci: {file: ci.pub}", "ci: {file: absent.pub}", "absent.pub: cannot be read (No such file or directory)."),
        ("ci: {file: ci.pub}", "ci: {file: ci}", "a private key. Give the public one"),
        ("ci: {file: ci.pub}", "ci: {pem: none}", "3: pem: not a public key in PEM"),
        ("ci: {file: ci.pub}", "ci: {file: release.pub}", "4: is the same as ci; a signer with two names would count"),
        ('names: ["*"]', 'names: ["A b"]', "17: rules.1.names.0 is 'A b'; write names, or patterns with * and ?."),
        ("version: 1", "version: 1\nversion: 1", "2: the key 'version' is there already"),
        ("version: 1", "version: &a 1", "1: anchors and aliases are not allowed"),
    ],
)
def test_mistakes_are_named_with_their_line(write: Write, old: str, new: str, expected: str) -> None:
    found = problems(write((old, new)))
    assert len(found) == 1 and expected in found[0], found


def test_all_mistakes_are_shown_at_once(write: Write) -> None:
    path = write(("threshold: 2", "threshold: 3"), ("signers: [cloud]}", "signers: [clud]}"))
    assert [problem.partition(":")[0] for problem in problems(path)] == ["13", "14"]


def test_what_is_no_policy_is_called_a_policy(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("- 1\n")
    assert problems(tmp_path / "p.yaml") == ["1: a policy is a mapping that begins with `version: 1`."]
    assert problems(tmp_path / "absent.yaml") == ["0: cannot be read: No such file or directory."]
    (tmp_path / "p.yaml").write_text("version: 1\n")
    assert problems(tmp_path / "p.yaml") == ["1: signers is missing.", "1: rules is missing."]


def test_the_place_of_a_requirement_is_known(write: Write) -> None:
    assert load_policy(write()).document.line(("rules", 0, "channels", "production")) == 16


def test_the_policy_in_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/trust.md").read_text()
    (example,) = re.findall(r"```yaml\n(version: 1\n.*?)```", text, re.DOTALL)
    for name in ("ci", "release"):
        write_key_pair(tmp_path / "keys" / name, "ed25519", None)
    (tmp_path / "policy.yaml").write_text(example)
    policy = load_policy(tmp_path / "policy.yaml")
    assert sorted(policy.rule_for("smollm2-135m").channels) == ["production", "staging"]
    assert policy.rule_for("critical-model").require[0].threshold == 2


def test_the_schema_for_editors(write: Write) -> None:
    schema = PolicyFile.model_json_schema()
    document = yaml.safe_load(write().read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"rule": []}, schema)
