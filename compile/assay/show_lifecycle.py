"""What is said, in lines for people, of keys, tags, promotions, differences, and of who signed what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from assay.show import duration, printable, size

if TYPE_CHECKING:
    from assay.registry.attestations import Said
    from assay.registry.channels import Moved
    from assay.registry.collecting import Removed
    from assay.registry.differences import Difference, ValueChange
    from assay.registry.keys import KeyFiles
    from assay.registry.layout import Collected
    from assay.registry.tags import Tagged
    from assay.registry.trust import Met

# Of a long list of changed values; JSON has all.
_MOST_CHANGES = 40


def key_lines(files: KeyFiles) -> Iterator[str]:
    yield f"private    {files.private} ({'encrypted' if files.encrypted else 'NOT encrypted'}; keep it to yourself)"
    yield f"public     {files.public} (give it to those who verify)"
    yield f"key id     {files.key_id}"


def tagged_lines(done: Tagged) -> Iterator[str]:
    if done.digest is None:
        yield f"untagged   {done.registry} {done.name}:{done.tag}"
        yield f"digest     {done.previous} (can still be pulled as {done.name}@{done.previous})"
        return
    yield f"{'tagged' if done.changed else 'unchanged':<10} {done.registry} {done.name}:{done.tag}"
    yield f"digest     {done.digest}"
    if done.changed and done.previous:
        yield f"before     {done.previous}"


def removed_lines(done: Removed) -> Iterator[str]:
    yield f"removed    {done.registry} {done.name}@{done.digest}"
    yield "blobs      stay until `assay gc` collects what nothing leads to"


def moved_lines(done: Moved) -> Iterator[str]:
    word = {"promote": "promoted", "rollback": "back to"}[done.action] if done.created else "unchanged"
    yield f"{word:<10} {done.registry} {done.name}:{done.channel}"
    yield f"digest     {done.digest}"
    yield f"before     {done.previous or 'nothing that is recorded'}"
    yield f"record     {done.sequence}, {'signed' if done.signed else 'NOT signed'}: {done.record}"
    yield from trusted_lines(done.trusted)
    for digest, reason in done.skipped:
        yield f"skipped    {digest}: {printable(reason)}"


def trusted_lines(trusted: Iterable[Met] | None) -> Iterator[str]:
    """What of a policy is met; one line that says that nobody asked when there was no policy."""
    if trusted is None:
        yield "signatures not checked: no --policy was given"
        return
    for met in trusted:
        yield f"trusted    {met.type}: signed by {', '.join(met.signers)}"


def said_lines(attestations: Iterable[Said]) -> Iterator[str]:
    """Attestations as `assay show` lists them: nothing of it is verified."""
    for said in attestations:
        if said.problem and not said.kind:
            yield f"attestation    {said.digest}: cannot be read ({printable(said.problem)})"
            continue
        by = f"claims to be signed by {', '.join(said.signers)}" if said.signers else "not signed"
        what = said.kind
        if change := said.promotion:
            when = f" at {change.time}" if change.time else ""
            what = f"{change.action} {change.sequence} in channel {change.channel}{when}"
        yield f"attestation    {printable(f'{what} of {said.name}: {by}')}"


def collected_lines(found: Collected, grace_seconds: float, dry_run: bool) -> Iterator[str]:
    word = "would go" if dry_run else "removed"
    yield f"{word:<10} {len(found.removed)} blobs, {size(found.removed_bytes)}"
    yield f"kept       {found.kept} blobs that something leads to"
    if found.young:
        yield f"left       {found.young} blobs that nothing leads to and that are younger than {duration(grace_seconds)}"


def difference_lines(found: Difference) -> Iterator[str]:
    yield f"before     {found.before} {found.digest_before} ({size(found.size_before)})"
    yield f"after      {found.after} {found.digest_after} ({size(found.size_after)})"
    if found.digest_before == found.digest_after:
        yield "the same   digest: not one byte differs"
    for file in found.files:
        sizes = " → ".join(size(known) for known in (file.size_before, file.size_after) if known is not None)
        yield f"{file.change:<10} {printable(file.name)} ({sizes})"
    for part, changes in (("recipe", found.recipe), ("manifest", found.manifest), ("lock", found.lock)):
        yield from _value_lines(part, changes)
    for figure in found.figures:
        yield (
            f"figure     {printable(figure.metric)}: {_number(figure.before)} → {_number(figure.after)} "
            f"(against its baseline {_number(figure.difference_before)} → {_number(figure.difference_after)})"
        )


def _value_lines(part: str, changes: tuple[ValueChange, ...]) -> Iterator[str]:
    for change in changes[:_MOST_CHANGES]:
        yield f"{part:<10} {printable(change.path)}: {_value(change.before)} → {_value(change.after)}"
    if len(changes) > _MOST_CHANGES:
        yield f"{part:<10} and {len(changes) - _MOST_CHANGES} more (--json has them all)"


def _value(value: Any) -> str:
    return printable("absent" if value is None else str(value))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
