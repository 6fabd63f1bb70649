"""The page in a real browser: silent, still, as wide as a phone, and legible in both schemes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedexlora.report.page import write_report
from tests.report.runs import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

HARNESS = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<body style="margin:0"><iframe id="page" style="border:0" width="WIDTH" height="900" srcdoc="PAGE">
</iframe><pre id="found"></pre><script>
const frame = document.getElementById("page");
function luminance(colour) {
  const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}
function ground(element, view) {
  for (let e = element; e; e = e.parentElement) {
    const colour = view.getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
  }
  return "rgb(255, 255, 255)";
}
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(x => x.open = true);
  const faint = [];
  let texts = 0;
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(x => x.nodeType === 3 && x.data.trim());
    if (!own || ["title", "desc"].includes(element.tagName)) continue;
    const style = view.getComputedStyle(element), svg = element.namespaceURI.endsWith("svg");
    const colour = svg ? style.fill : style.color;
    if (/^rgb\\(0, 0, 1\\)|^rgb\\(255, 255, 254\\)/.test(colour)) continue;  // on a map
    texts += 1;
    const [x, y] = [luminance(colour), luminance(ground(element, view))].sort((a, b) => b - a);
    const contrast = (x + 0.05) / (y + 0.05);
    if (contrast < 4.5) faint.push([element.tagName, element.textContent.slice(0, 40), contrast]);
  }
  const wide = [...page.body.querySelectorAll("*")].filter(e =>
    !e.closest(".scroll, svg") && e.getBoundingClientRect().right > view.innerWidth + 0.5);
  document.getElementById("found").textContent = JSON.stringify({
    inner: view.innerWidth, scroll: page.documentElement.scrollWidth, texts, faint,
    wide: wide.map(e => e.tagName + " " + e.className),
    small: [...page.querySelectorAll("svg text")].map(e => {
      const m = e.getScreenCTM();
      return parseFloat(view.getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b);
    }).reduce((a, b) => Math.min(a, b), 99),
    fetched: view.performance.getEntriesByType("resource").map(e => e.name),
    ground: view.getComputedStyle(page.body).backgroundColor,
  });
};
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / f"{m}-{s}", m, seed=s) for m in ("fedex", "fedit") for s in (0, 1)]
    long = write_run(
        folder / "long", recipe={"data": {"source": "a" * 300}}, clients=("c" * 64, "d", "e")
    )
    write_report([long], folder / "one.html")
    write_report(runs, folder / "several.html")
    return {name: folder / f"{name}.html" for name in ("one", "several")}


def measured(page: Path, folder: Path, width: int, scheme: str) -> tuple[dict, str]:
    """What the browser says of the page in a frame of that width, and its log."""
    harness = folder / "harness.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    harness.write_text(HARNESS.replace("WIDTH", str(width)).replace("PAGE", text), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom",
        harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_a_phone_shows_all_of_it_without_a_sound(pages, tmp_path, name, scheme):
    found, log = measured(pages[name], tmp_path, 360, scheme)
    assert found["inner"] == 360
    assert found["scroll"] <= 360
    assert not found["wide"]
    assert found["texts"] > 100
    assert not found["faint"]
    assert found["small"] >= 8.5, "pixels of the smallest letters in a figure"
    assert not found["fetched"]
    assert "CONSOLE" not in log
    assert found["ground"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
