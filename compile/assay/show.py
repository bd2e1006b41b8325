"""How results are shown: tables for people, JSON for programs, nothing more than the result when quiet."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from assay.files import readable_json
from assay.progress import Progress, progress_for

if TYPE_CHECKING:
    from rich.console import Console

    from assay.checking import CheckResult
    from assay.importing import Imported
    from assay.pipeline import Outcome
    from assay.plan import Plan
    from assay.pulling import Pulled
    from assay.registry import inspection
    from assay.registry.publish import Receipt
    from assay.serving.make import Serving
    from assay_evals.comparison import Compared
    from assay_evals.load.result import Result
    from assay_evals.runtimes.base import Continuation
    from assay_evals.verdict import Verdict


class Output:
    """Standard output of one command.  json: machine-readable.  quiet: no progress, only the result."""

    def __init__(self, json: bool, quiet: bool) -> None:
        self._json = json
        self._quiet = quiet

    @cached_property
    def progress(self) -> Progress:
        return progress_for(self._quiet)

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        return Console(highlight=False, soft_wrap=True)

    def checked(self, result: CheckResult) -> None:
        if self._json:
            self._write_json({"passed": result.passed, "files": _plain(result.files)})
            return
        for checked in result.files:
            for problem in checked.problems:
                sys.stderr.write(f"{problem}\n")
            if not checked.problems and not self._quiet:
                sys.stdout.write(f"{checked.file}: ok{f' ({checked.note})' if checked.note else ''}\n")

    def imported(self, found: Imported) -> None:
        if self._json:
            self._write_json(_plain(found))
            return
        for problem in found.left_out:
            sys.stderr.write(f"{printable(str(problem))}\n")
        if found.written is None:
            sys.stdout.write(found.recipe)
        elif not self._quiet:
            parts = ", ".join(found.chosen)
            sys.stdout.write(f"{found.written}: ok{f' ({found.note})' if found.note else ''}; chosen here: {parts}\n")

    def planned(self, plan: Plan) -> None:
        if self._json:
            self._write_json(_plain(plan))
            return
        from rich.table import Table

        stages = Table("stage", "state", "time", title=f"{plan.name}: {plan.model}", title_justify="left")
        for stage in plan.stages:
            stages.add_row(
                stage.name, "cached" if stage.cached else "to do", "" if stage.cached else duration(stage.seconds)
            )
        self._console.print(stages)
        if plan.peak_memory_bytes > plan.machine_memory_bytes:
            self._console.print(
                f"[bold red]not enough memory[/]: this machine has {size(plan.machine_memory_bytes)}; "
                "lower calibration.samples or calibration.length, or use a larger machine"
            )
        self._console.print(
            f"about {duration(plan.seconds)} and {size(plan.peak_memory_bytes)} of memory; "
            f"artifact about {size(plan.artifact_bytes)} at {plan.bits_per_weight:.2f} bits per quantized weight"
        )
        reach = Table("gate", "criterion", "samples", "can it conclude?", title_justify="left")
        for row in plan.reach:
            rule = ", ".join(f"{name} {value:g}" for name, value in row.criterion.items())
            reach.add_row(
                row.metric, rule, f"{row.samples:,}", f"{'yes' if row.in_reach else 'OUT OF REACH'}: {row.sentence}"
            )
        self._console.print(reach)

    def judged(self, verdict: Verdict) -> None:
        if self._json:
            self._write_json(verdict.to_json())
            return
        from assay_evals.report.table import verdict_table

        self._console.print(verdict_table(verdict))
        self._say_verdict(verdict)

    def concluded(self, outcome: Outcome) -> None:
        if self._json:
            body = {"run": str(outcome.run), "report": str(outcome.report), "verdict": outcome.verdict.to_json()}
            body |= {"published": _plain(outcome.receipt), "refused": outcome.refused, "exit_code": outcome.exit_code}
            self._write_json(body)
            return
        self.judged(outcome.verdict)
        sys.stdout.write(f"report     {outcome.report}\n")
        if outcome.receipt:
            self.published(outcome.receipt)
        else:
            reason = outcome.refused or "it was not asked for"
            if outcome.refused and not outcome.verdict.passed:
                reason = f"the verdict is {outcome.verdict.verdict}"
            sys.stdout.write(f"published  no: {reason}\n")

    def compared(self, found: tuple[Compared, ...]) -> None:
        if self._json:
            self._write_json(_plain(found))
            return
        from assay_evals.report.table import comparison_table

        self._console.print(comparison_table(found))

    def benched(self, result: Result, form: Literal["table", "markdown"]) -> None:
        if self._json:
            self._write_json(result.to_json(raw=False))
            return
        if form == "markdown":
            from assay_evals.load.markdown import load_markdown

            sys.stdout.write(load_markdown(result))
            return
        from assay_evals.load.table import load_tables

        for table in load_tables(result):
            self._console.print(table)
        for note in result.notes:
            self._console.print(f"note       {note}", markup=False)
        self._say_verdict(result)

    def _say_verdict(self, verdict: Verdict | Result) -> None:
        colour = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}.get(
            verdict.verdict, "bold magenta"
        )
        self._console.print(f"verdict    [{colour}]{verdict.verdict}[/]")
        for reason in verdict.reasons:
            self._console.print(f"           {reason}", markup=False)

    def published(self, receipt: Receipt) -> None:
        if self._json:
            self._write_json(_plain(receipt))
            return
        state = "published" if receipt.created else "published  already there:"
        sys.stdout.write(
            f"{state:<10} {receipt.registry} {receipt.name}:{', '.join(receipt.tags)}\ndigest     {receipt.digest}\n"
        )
        signed = f"by {receipt.signer}" if receipt.signer else "no: no key was given, and no policy will trust it"
        sys.stdout.write(f"signed     {signed}\n")

    def pulled(self, pulled: Pulled) -> None:
        receipt = pulled.receipt
        if self._json:
            serving = _serving_json(pulled.serving) if pulled.serving else None
            self._write_json(_plain(receipt) | {"serving": serving, "unchecked": list(pulled.unchecked)})
            return
        state = "pulled" if receipt.created else "unchanged"
        sys.stdout.write(
            f"{state:<10} {receipt.destination} ({len(receipt.files)} files, {size(receipt.size_bytes)})\n"
        )
        sys.stdout.write(f"digest     {receipt.digest}\n")
        if receipt.trusted is not None:
            from assay.show_lifecycle import trusted_lines

            self._write_lines(trusted_lines(receipt.trusted))
        self._notes(pulled.unchecked)
        if pulled.serving:
            self.served(pulled.serving)

    def listed(self, listings: tuple[inspection.Listing, ...]) -> None:
        if self._json:
            self._write_json(_plain(listings))
            return
        from rich.table import Table

        table = Table("name", "tag", "digest", "size", "scheme", "target", "verdict")
        for row in listings:
            facts = row.annotations
            signers = f"{len(row.signers)} signer{'s' * (len(row.signers) != 1)}" if row.signers else "unsigned"
            verdicts = row.problem or ", ".join((*row.verdicts, signers))
            tag = f"{row.tag} (channel)" if row.tag in row.promoted else row.tag or ""
            scheme, target = facts.get("dev.assay.scheme", ""), facts.get("dev.assay.target", "")
            cells = (row.name, tag, row.digest[:19] + "…", size(row.size_bytes), scheme, target, verdicts)
            table.add_row(*map(_escape, cells))
        self._console.print(table)

    def shown(self, artifact: inspection.Artifact) -> None:
        if self._json:
            self._write_json(_plain(artifact))
            return
        from rich.table import Table

        for name, value in {
            "names": ", ".join(artifact.names),
            "digest": artifact.digest,
            "bundle": artifact.bundle_digest,
            "size": size(artifact.size_bytes),
            **{name.removeprefix("dev.assay."): value for name, value in artifact.annotations.items()},
        }.items():
            sys.stdout.write(f"{printable(name):<14} {printable(value)}\n")
        table = Table("file", "size", "digest")
        for file in artifact.files:
            table.add_row(_escape(file.name), size(file.size_bytes), file.digest)
        self._console.print(table)
        for evidence in artifact.evidence:
            sys.stdout.write(f"evidence       {evidence.digest}: {evidence.verdict.get('verdict')}\n")
            for reason in evidence.verdict.get("reasons", []):
                sys.stdout.write(f"               {printable(str(reason))}\n")
        from assay.show_lifecycle import said_lines

        self._write_lines(said_lines(artifact.attestations))

    def verified(self, found: inspection.Verification) -> None:
        if self._json:
            self._write_json(_plain(found))
            return
        sys.stdout.write(
            f"intact     {found.reference}: {found.blobs} blobs, {size(found.size_bytes)}\ndigest     {found.digest}\n"
        )
        sys.stdout.write(f"PASS       for exactly these bytes, in {len(found.evidence)} evidence record(s)\n")
        from assay.show_lifecycle import trusted_lines

        self._write_lines(trusted_lines(found.trusted))
        if found.strangers:
            names = printable(", ".join(found.strangers))
            sys.stdout.write(f"beside it  {names}: not as published. A pull leaves them out; other loaders may not.\n")

    def verified_directory(self, facts: inspection.DirectoryFacts, found: inspection.Verification | None) -> None:
        """found: the artifact of these bytes in a registry; None when only a digest was compared."""
        if self._json:
            self._write_json(_plain(facts) | {"published": _plain(found)})
            return
        sys.stdout.write(f"directory  {facts.directory}: {len(facts.files)} files, {size(facts.size_bytes)}\n")
        sys.stdout.write(f"bundle     {facts.bundle_digest}\ndigest     {facts.digest}\n")
        if found:
            self.verified(found)

    def served(self, made: Serving) -> None:
        if self._json:
            self._write_json(_serving_json(made))
            return
        state = "written" if made.created else "unchanged"
        sys.stdout.write(
            f"{state:<10} {made.directory}: {', '.join(made.files)}\nserves     {made.name}@{made.digest}\n"
        )
        if made.modelcar:
            sys.stdout.write(f"modelcar   {made.modelcar.layout}:{made.modelcar.tag} {made.modelcar.digest}\n")
        self._notes(made.notes)
        sys.stdout.write(f"start      {made.shell_command}\n")

    def _notes(self, notes: tuple[str, ...]) -> None:
        for note in () if self._quiet else notes:
            sys.stdout.write(f"note       {printable(note)}\n")

    def generated(self, found: Continuation) -> None:
        if self._json:
            self._write_json(_plain(found))
            return
        self._console.print(f"[dim]{_escape(found.prompt)}[/]{_escape(found.text)}")
        if found.time_to_first_token_seconds is None:
            sys.stderr.write("the model ended its text at once\n")
        elif not self._quiet:
            rate = f", then {found.decode_tokens_per_second:.1f} tokens/s" if found.decode_tokens_per_second else ""
            sys.stderr.write(f"first token after {found.time_to_first_token_seconds * 1000:.0f} ms{rate}\n")

    def told(self, value: Any, lines: Iterable[str]) -> None:
        """A result, and the lines that say it to people."""
        if self._json:
            self._write_json(_plain(value))
        else:
            self._write_lines(lines)

    def _write_lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            sys.stdout.write(f"{line}\n")

    def _write_json(self, value: Any) -> None:
        sys.stdout.buffer.write(readable_json(value))


def _serving_json(made: Serving) -> dict[str, Any]:
    return _plain(made) | {"shell_command": made.shell_command}


def printable(text: str) -> str:
    """Text from a registry or a model without what would steer a terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def _escape(text: str) -> str:
    """The same, with nothing in it that rich would take for markup."""
    from rich.markup import escape

    return escape(printable(text))


def _plain(value: Any) -> Any:
    """Dataclasses and paths as JSON can hold them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def size(size_bytes: float) -> str:
    """Bytes for people, in powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
