"""The trust policy: who may sign what, for which names, and who may promote into which channel.

One YAML file, read as strictly as a recipe.  It is a whitelist: a name that no rule is about, a kind of attestation
that a rule does not ask for and a channel that it does not name are not trusted because of anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from assay.errors import RecipeError, SignatureError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.recipe_errors import explain
from assay.recipe_yaml import Document, Location, read_document
from assay.registry.keys import PublicKey, load_public_key, read_pem
from assay.strict import Strict

_WORD = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
Word = Annotated[str, Field(pattern=_WORD, description="letters, digits, dots, dashes and underscores, at most 128")]
Pattern = Annotated[str, Field(pattern=r"^[a-z0-9._*?-]+$", description="a name, or a pattern with * and ?")]


class SignerEntry(Strict):
    """Who a signer is: a public key (`file` or `pem`), or an identity that an issuer vouches for."""

    file: Annotated[str | None, Field(description="a public key in PEM, from the policy's directory")] = None
    pem: Annotated[str | None, Field(description="a public key in PEM")] = None
    identity: Annotated[str | None, Field(description="of a sigstore certificate: an e-mail address or a URI")] = None
    issuer: Annotated[str | None, Field(description="that vouches for the identity, as an https URL")] = None


class Requirement(Strict):
    """An attestation that must be there, signed by so many different signers of a list."""

    type: Literal["test-result", "provenance", "bom"]
    signers: Annotated[tuple[Word, ...], Field(min_length=1, description="names of signers")]
    threshold: Annotated[int, Field(ge=1)] = 1


class Channel(Strict):
    """Who may promote into a channel."""

    signers: Annotated[tuple[Word, ...], Field(min_length=1, description="names of signers")]


class Rule(Strict):
    """What artifacts of some names need."""

    names: Annotated[tuple[Pattern, ...], Field(min_length=1, description="names, or patterns with * and ?")]
    require: Annotated[tuple[Requirement, ...], Field(min_length=1)]
    channels: Annotated[dict[Word, Channel], Field(default_factory=dict)]


class PolicyFile(Strict):
    """A whole policy file."""

    version: Literal[1]
    signers: Annotated[dict[Word, SignerEntry], Field(min_length=1)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Identity:
    """Whom a sigstore certificate is for, and who vouches for that."""

    subject: str
    issuer: str


@dataclass(frozen=True)
class Policy:
    """A policy that was read and makes sense.  digest: of what it says, whatever the file's layout."""

    file: str
    digest: str
    signers: dict[str, PublicKey | Identity]
    rules: tuple[Rule, ...]
    document: Document

    def rule_for(self, name: str) -> Rule:
        """The first rule that is about a name; SignatureError when none is."""
        for rule in self.rules:
            if any(fnmatchcase(name, pattern) for pattern in rule.names):
                return rule
        patterns = ", ".join(pattern for rule in self.rules for pattern in rule.names)
        raise SignatureError(f"{self.file}: no rule is about {name!r} (rules: {patterns}), so that it is not trusted.")

    def name_of(self, key: PublicKey) -> str | None:
        """What the policy calls the owner of a key."""
        owners = (
            name
            for name, signer in self.signers.items()
            if isinstance(signer, PublicKey) and signer.key_id == key.key_id
        )
        return next(owners, None)


def load_policy(path: Path) -> Policy:
    """Read and check a policy file; RecipeError names every problem with its line."""
    document = read_document(path, "policy")
    try:
        content = PolicyFile.model_validate_json(canonical_json(document.data))
    except ValidationError as error:
        raise RecipeError(explain(error, document, PolicyFile)) from error
    signers: dict[str, PublicKey | Identity] = {}
    problems = [document.problem(location, message) for location, message in _contradictions(content)]
    for name, entry in content.signers.items() if not problems else ():
        try:
            signers[name] = _signer(entry, path)
        except UsageError as error:
            problems.append(document.problem(("signers", name), str(error)))
    problems += [document.problem(("signers", name), message) for name, message in _repeated(signers)]
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: problem.line))
    said: dict[str, Any] = content.model_dump(mode="json")
    # The key that a file holds is part of what is said; what the file is called is not.
    said["signers"] = {
        name: signer.key_id if isinstance(signer, PublicKey) else {"subject": signer.subject, "issuer": signer.issuer}
        for name, signer in signers.items()
    }
    return Policy(str(path), sha256_bytes(canonical_json(said)), signers, content.rules, document)


def _signer(entry: SignerEntry, path: Path) -> PublicKey | Identity:
    if entry.identity is not None:
        return Identity(entry.identity, str(entry.issuer))
    if entry.pem is not None:
        return load_public_key(entry.pem.encode(), "pem")
    file = path.parent / str(entry.file)
    return load_public_key(read_pem(file), str(file))


def _contradictions(content: PolicyFile) -> Iterator[tuple[Location, str]]:
    """Things that are each well-formed and make no sense together."""
    for name, entry in content.signers.items():
        place: Location = ("signers", name)
        if [entry.file, entry.pem, entry.identity].count(None) != 2:
            yield place, f"signers.{name} needs exactly one of: file, pem, identity."
        elif (entry.identity is None) != (entry.issuer is None):
            yield place, f"signers.{name}: identity and issuer belong together; write both, or a key."
    for index, rule in enumerate(content.rules):
        base: Location = ("rules", index)
        lists = [((*base, "require", number, "signers"), needed.signers) for number, needed in enumerate(rule.require)]
        lists += [((*base, "channels", name, "signers"), channel.signers) for name, channel in rule.channels.items()]
        for location, names in lists:
            for number, name in enumerate(names):
                if name not in content.signers:
                    known = ", ".join(content.signers)
                    yield (*location, number), f"there is no signer {name!r}; signers has: {known}."
                elif name in names[:number]:
                    yield (*location, number), f"{name} is there already; remove one of the two."
        for number, needed in enumerate(rule.require):
            if needed.threshold > len(needed.signers):
                message = (
                    f"threshold is {needed.threshold}, but {len(needed.signers)} may sign; add signers, or lower it."
                )
                yield (*base, "require", number, "threshold"), message
            if needed.type in [other.type for other in rule.require[:number]]:
                message = f"{needed.type} is asked for already; write one list of signers, with a threshold."
                yield (*base, "require", number), message


def _repeated(signers: dict[str, PublicKey | Identity]) -> Iterator[tuple[str, str]]:
    """Two names for one signer, who would count twice."""
    seen: dict[object, str] = {}
    for name, signer in signers.items():
        key = signer.key_id if isinstance(signer, PublicKey) else signer
        if key in seen:
            yield name, f"is the same as {seen[key]}; a signer with two names would count twice."
        else:
            seen[key] = name
