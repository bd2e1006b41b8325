"""What publishing and pulling cost beside plain copying, what they need of memory, and what a newer version moves.

    taskset -c 1 .venv/bin/python benchmarks/registry.py [--directory DIR] [--size 1.0] [--rounds 3] [--large 4.0] [--server-only]

Publishes to and pulls from a layout, beside `cp -r` and `sha256sum` of the same files; pulls from Debian's docker-registry on loopback,
beside `skopeo copy` of the same artifact.  Each in a process of its own, in turns, in each round; the medians of wall clock and processor
time are printed, with the interpreter's start counted.  Then an artifact of `--large` GB is published and pulled for its peak memory, and a
version with 1 of 50 files changed is pulled over the older one.  Files are random bytes, in `--directory` (a temporary one by default).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
from finished_run import write_artifact, write_proof
from oci_server import running_oci_server

CHUNK = 1 << 24
PUBLISH = "import sys; from pathlib import Path; from assay.registry.publish import publish; r, a, n = sys.argv[1:]; "
PUBLISH += "publish(Path(r) / 'artifact', Path(r), a, n)"


@dataclass(frozen=True)
class Cost:
    """Of one process and its children."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def cost_of(*command: str | Path) -> Cost:
    """Run to the end and measure."""
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"failed: {command}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def shell(script: str, *arguments: str | Path) -> Cost:
    return cost_of("sh", "-c", script, "sh", *arguments)


def publish(run: Path, address: str, name: str) -> Cost:
    return cost_of(sys.executable, "-c", PUBLISH, run, address, name)


def pull(reference: str, destination: Path, address: str, *options: str) -> Cost:
    return cost_of(
        Path(sys.executable).with_name("assay"), "pull", reference, destination, "--registry", address, *options
    )


def write_run(run: Path, shards: int, shard_bytes: int) -> Path:
    """A finished run with random weights."""
    write_artifact(run / "artifact", {"model.onnx": b"graph", "tokenizer.json": os.urandom(2_000_000)})
    for number in range(shards):
        with (run / f"artifact/model-{number}.onnx.data").open("wb") as file:
            for start in range(0, shard_bytes, CHUNK):
                file.write(os.urandom(min(CHUNK, shard_bytes - start)))
    write_proof(run)
    return run


def compare(rows: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, Cost]:
    """Medians of interleaved rounds; everything is synced in between, so that nobody writes another's bytes."""
    costs: dict[str, list[Cost]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, measure in rows.items():
            os.sync()
            costs[name].append(measure())
    return {
        name: Cost(
            statistics.median(cost.wall_seconds for cost in found),
            statistics.median(cost.cpu_seconds for cost in found),
            max(cost.peak_bytes for cost in found),
        )
        for name, found in costs.items()
    }


def show(costs: dict[str, Cost], size_bytes: int) -> None:
    for name, cost in costs.items():
        rate = size_bytes / cost.wall_seconds / 1e6
        print(
            f"{name:<44} {cost.wall_seconds:7.2f} s {cost.cpu_seconds:7.2f} s of processor "
            f"{rate:7.0f} MB/s {cost.peak_bytes / 1e6:7.0f} MB peak",
            flush=True,
        )


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def layout_and_copy(place: Path, run: Path, size_bytes: int, rounds: int) -> None:
    artifact, store, out = run / "artifact", place / "store", place / "out"
    hashed = 'cp -r "$1" "$2" && find "$2" -type f -print0 | xargs -0 '
    rows = {
        "cp -r and sha256sum": lambda: shell(hashed + "sha256sum", artifact, fresh(out)),
        "cp -r, sync and sha256sum": lambda: shell(
            'cp -r "$1" "$2" && sync -f "$2" && find "$2" -type f -print0 | xargs -0 sha256sum', artifact, fresh(out)
        ),
        "cp -r and openssl dgst -sha256": lambda: shell(hashed + "openssl dgst -sha256", artifact, fresh(out)),
        "assay publish to a layout": lambda: publish(run, str(fresh(store)), "model"),
        "assay pull from a layout": lambda: pull("model", fresh(out), str(store)),
    }
    costs = compare(rows, rounds)
    show(costs, size_bytes)
    plain = costs["cp -r and sha256sum"].wall_seconds
    for name in ("assay publish to a layout", "assay pull from a layout"):
        print(f"  {name}: {plain / costs[name].wall_seconds:.2f} times the rate of cp and sha256sum")
    fresh(store)
    fresh(out)


def server_and_skopeo(place: Path, run: Path, size_bytes: int, rounds: int) -> None:
    out = place / "out"
    with running_oci_server(place / "server") as server:
        address = f"oci://{server.host}/bench"
        show({"assay publish to docker-registry": publish(run, address, "model")}, size_bytes)
        source = f"docker://{server.host}/bench/model:latest"
        copy = ("skopeo", "copy", "--quiet", "--src-tls-verify=false", source)
        rows = {
            "skopeo copy to an OCI layout": lambda: cost_of(*copy, f"oci:{fresh(out)}:model"),
            "skopeo copy to a directory": lambda: cost_of(*copy, f"dir:{fresh(out)}"),
            "skopeo copy to a directory, sync": lambda: shell(
                'skopeo copy --quiet --src-tls-verify=false "$1" "dir:$2" && sync -f "$2"', source, fresh(out)
            ),
            "assay pull from docker-registry": lambda: pull("model", fresh(out), address),
        }
        costs = compare(rows, rounds)
    show(costs, size_bytes)
    ours = costs["assay pull from docker-registry"]
    for name in [name for name in rows if name.startswith("skopeo")]:
        ratio, of_processor = costs[name].wall_seconds / ours.wall_seconds, costs[name].cpu_seconds / ours.cpu_seconds
        print(f"  assay pull: {ratio:.2f} times the rate of {name}, by processor time {of_processor:.2f}")
    fresh(out)
    fresh(run)
    fresh(place / "server")


def memory(place: Path, size_bytes: int) -> None:
    run = write_run(place / "run", 2, size_bytes // 2)
    store, out = place / "store", place / "out"
    show({"large: publish to a layout": publish(run, str(store), "model")}, size_bytes)
    show({"large: pull from a layout": pull("model", out, str(store))}, size_bytes)
    fresh(store)
    fresh(out)
    with running_oci_server(place / "server") as server:
        address = f"oci://{server.host}/bench"
        show({"large: publish to docker-registry": publish(run, address, "model")}, size_bytes)
        fresh(run)
        show({"large: pull from docker-registry": pull("model", out, address)}, size_bytes)
    fresh(out)
    fresh(place / "server")


def newer_version(place: Path) -> None:
    files = {"model.onnx": b"graph"} | {f"part-{number}.onnx.data": os.urandom(2_000_000) for number in range(49)}
    old, new = place / "old", place / "new"
    write_artifact(old / "artifact", files)
    write_artifact(new / "artifact", files | {"part-7.onnx.data": os.urandom(2_000_000)})
    for run in (old, new):
        write_proof(run)
    with running_oci_server(place / "server") as server:
        for address in (str(place / "store"), f"oci://{server.host}/bench"):
            publish(old, address, "model")
            pull("model", fresh(place / "out"), address)
            publish(new, address, "model")
            command = [str(Path(sys.executable).with_name("assay")), "pull", "model", str(place / "out"), "--force"]
            done = subprocess.run(
                [*command, "--json", "--registry", address], check=True, capture_output=True, text=True
            )
            receipt = json.loads(done.stdout)
            print(
                f"newer version from {address.partition(':')[0] if '://' in address else 'a layout'}: "
                f"{receipt['moved_bytes']:,} of {receipt['size_bytes']:,} bytes moved"
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--directory", type=Path)
    options.add_argument("--size", type=float, default=1.0, help="GB")
    options.add_argument("--large", type=float, default=4.0, help="GB")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--server-only", action="store_true", help="compare with skopeo, and nothing else")
    chosen = options.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        place = Path(directory)
        size_bytes = int(chosen.size * 1e9)
        run = write_run(place / "run", 4, size_bytes // 4)
        if not chosen.server_only:
            layout_and_copy(place, run, size_bytes, chosen.rounds)
        server_and_skopeo(place, run, size_bytes, chosen.rounds)
        if chosen.server_only:
            return
        if chosen.large:
            memory(place, int(chosen.large * 1e9))
        # Last: a process that is started counts the memory of the one that starts it.
        newer_version(place / "newer")


if __name__ == "__main__":
    main()
