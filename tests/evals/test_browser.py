"""The report in a real browser: nothing on its console, nothing wider than the screen, both themes, and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assay_evals.evidence import Continuation, Continued, Evidence
from assay_evals.gate import judge
from assay_evals.report import render_report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
# The page in a frame as wide as the screen (a window of Chromium's is never narrower than 500), without the content policy that would keep
# a script from looking: what sticks out to the right, but for what lies in a box that scrolls by itself.
FRAME = """<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><pre id="seen"></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, body = page.documentElement;
  const bottom = name => page.querySelector(name).getBoundingClientRect().bottom;
  const out = [...page.querySelectorAll("main *")].filter(
    one => !one.closest(".scroll, pre, svg") && one.getBoundingClientRect().right > body.clientWidth + 1);
  document.getElementById("seen").textContent = JSON.stringify({{
    width: body.clientWidth, wide: body.scrollWidth - body.clientWidth, out: out.map(one => one.outerHTML.slice(0, 80)),
    paper: event.target.contentWindow.getComputedStyle(page.body).backgroundColor, verdict: bottom("h1"), why: bottom(".summary")}});
}};
</script>"""


def chromium(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={home / 'browser'}",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def rendered(evidence: Evidence, directory: Path) -> Path:
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    layers: list[dict[str, Any]] = [
        {"name": f"model.layers.{block}.{kind}", "scheme": "W4A16", "group_size": 64, "relative_error": 0.01 * block}
        for block in range(6)
        for kind in kinds
    ]
    page = directory / "report.html"
    page.write_bytes(render_report("html", judge(evidence), evidence, {"version": 1, "layers": layers}, {"seed": 0}))
    return page


def seen(page: Path, width: int, *options: str) -> dict[str, Any]:
    """What a script finds in the page on a screen of this width."""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=html.escape(source)), encoding="utf-8")
    done = chromium("--dump-dom", "--window-size=1400,1000", *options, frame.as_uri(), home=page.parent)
    found = re.search(r"<pre id=\"seen\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def evidence(good: Evidence, make_evidence: Callable[..., Evidence]) -> Evidence:
    """A failing run with long names and continuations, which is where a page breaks."""
    failing = make_evidence(kl=0.2, speedup=1.5)
    rows = tuple(
        Continuation(
            document="a-document-with-a-long-name" * 3,
            window=number,
            prompt_tokens=8,
            new_tokens=12,
            prompt="once upon a time " * 8,
            same=number,
            together="there",
            baseline=Continued(tokens=12, ended=False, text="there was " * 10),
            candidate=Continued(tokens=12, ended=False, text="there" + "x" * 300),
        )
        for number in range(4)
    )
    return replace(failing, continuations=(*rows, replace(rows[0], document="other")))


def test_a_browser_has_nothing_to_complain_about(evidence: Evidence, tmp_path: Path) -> None:
    page = rendered(evidence, tmp_path)
    done = chromium("--dump-dom", page.as_uri(), home=tmp_path)
    assert "<h1>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_the_verdict_is_on_the_first_one(
    evidence: Evidence, tmp_path: Path, width: int
) -> None:
    found = seen(rendered(evidence, tmp_path), width)
    assert found["width"] == width and (found["wide"], found["out"]) == (0, [])
    assert found["verdict"] < 300 and found["why"] < 900


def test_a_dark_screen_gets_a_dark_page(evidence: Evidence, tmp_path: Path) -> None:
    page = rendered(evidence, tmp_path)
    light, dark = (
        seen(page, 1280, *options)["paper"] for options in ((), ("--blink-settings=preferredColorScheme=0",))
    )
    assert light == "rgb(251, 250, 247)" and dark == "rgb(21, 23, 26)"


def test_it_prints(evidence: Evidence, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    chromium(f"--print-to-pdf={paper}", rendered(evidence, tmp_path).as_uri(), home=tmp_path)
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 3 <= pages <= 9
