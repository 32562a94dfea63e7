"""The page in a browser: at desktop and phone width, at 400 % zoom, and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import FINDINGS, sample_audit

from monai_unlearn.report import render_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH to look at the page with")

# A window of 1280 px at a zoom of 400 % is 320 px wide.
WIDTHS = (1280, 390, 320)
# Each width has a frame of its own, in which the page can't tell that it is not in a window that wide.
MEASURE = """
const found = {};
for (const frame of document.querySelectorAll('iframe')) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const wide = [...page.querySelectorAll('body *')].filter(part =>
    !part.closest('.scroll') && part.getBoundingClientRect().right > view.innerWidth + 0.5);
  const small = [...page.querySelectorAll('summary, nav a')].filter(part =>
    part.getClientRects().length && part.getBoundingClientRect().height < 24);
  const regions = [...page.querySelectorAll('.scroll')];
  frame.focus();
  found[frame.dataset.name] = {
    inner: view.innerWidth,
    scroll: page.documentElement.scrollWidth,
    wide: wide.map(part => part.outerHTML.slice(0, 80)),
    small: small.map(part => part.outerHTML.slice(0, 80)),
    scrolling: regions.filter(part => part.scrollWidth > part.clientWidth).length,
    unreachable: regions.filter(part => (part.focus(), page.activeElement !== part) && part.checkVisibility()).length,
    hidden: [...page.querySelectorAll('details')].filter(part =>
      ![...part.querySelectorAll('table, pre')].every(inner => inner.checkVisibility()
        && inner.getBoundingClientRect().height > 0)).length,
    plots: [...page.querySelectorAll('figure svg')].filter(part => part.getBoundingClientRect().height > 50).length,
  };
}
const output = document.createElement('pre');
output.id = 'found';
output.textContent = JSON.stringify(found);
document.body.append(output);
"""


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], tuple]:
    """Measures of pages by name, and what the browser's console says."""
    folder = tmp_path_factory.mktemp("browser")

    def measure(pages: dict[str, tuple[int, str]]) -> tuple[dict[str, dict], list[str]]:
        frames = "".join(
            f'<iframe data-name="{name}" width="{width}" height="900" style="border: 0" srcdoc="{html.escape(page)}">'
            "</iframe>"
            for name, (width, page) in pages.items()
        )
        script = f"<script>addEventListener('load', () => {{ {MEASURE} }});</script>"
        document = folder / "frames.html"
        document.write_text(f"<!DOCTYPE html><body>{frames}{script}</body>", encoding="utf-8")
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={folder / 'profile'}",
                "--enable-logging=stderr",
                "--virtual-time-budget=5000",
                "--dump-dom",
                document.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(html.unescape(found[1])), console

    return measure


def _report(make_report: Callable[..., dict], **changes: Any) -> dict[str, Any]:
    """A report with long names, of which a narrow page could become too wide."""
    audit = sample_audit(several=True, classes=FINDINGS)
    groups = audit["subgroups"]["sex"]["groups"]
    audit["subgroups"]["a_column_with_a_long_name_without_any_spaces"] = {
        "groups": {"g" * 60: groups["F"], "short": groups["M"]},
        "largest": audit["subgroups"]["sex"]["largest"],
    }
    path = "/".join(["a_folder_with_a_long_name"] * 6)
    return make_report(
        audit=audit,
        left=[{"what": "m" * 50, "path": path, "ours": True, "holds": "weights from before"}],
        notes=["n" * 100],
        settings={"s" * 60: "v" * 90},
        method="a_method_with_a_long_name_without_any_spaces",
        **changes,
    )


def test_the_page_fits_at_any_width_is_usable_by_keyboard_and_open_on_paper(
    make_report: Callable[..., dict], measured: Callable
) -> None:
    page = render_html(_report(make_report))
    # What applies on paper, applied on a screen of a paper's width.
    paper = page.replace("@media print", "@media screen")
    pages = {str(width): (width, page) for width in WIDTHS} | {"paper": (720, paper)}
    found, console = measured(pages)
    assert console == []
    assert set(found) == set(pages)
    for name, measures in found.items():
        assert measures["inner"] == pages[name][0]
        assert measures["scroll"] <= measures["inner"], name
        assert measures["plots"] == page.count("<svg"), name
        if name != "paper":
            assert measures["wide"] == [], name
            assert measures["small"] == [], name
            assert measures["unreachable"] == 0, name
    assert found["320"]["scrolling"] > 5
    assert found["paper"]["hidden"] == 0
    assert found["1280"]["hidden"] > 5, "closed parts are closed on a screen"


def test_the_measures_see_what_is_wrong(measured: Callable) -> None:
    broken = (
        '<!DOCTYPE html><body style="margin: 0"><p style="width: 500px">wide</p>'
        '<nav><a href="#" style="font-size: 5px">small</a></nav>'
        '<div class="scroll">no tabindex</div><script>undefined_name();</script></body>'
    )
    found, console = measured({"narrow": (320, broken)})
    assert found["narrow"]["scroll"] == 500
    assert len(found["narrow"]["wide"]) == 1
    assert len(found["narrow"]["small"]) == 1
    assert found["narrow"]["unreachable"] == 1
    assert any("undefined_name" in line for line in console)
