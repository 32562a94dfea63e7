"""The page of the queue in Chromium, driven as a person does: look, ask what is meant, forget, follow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from server import PYTHON, REASON, Server
from studies import write_studies

# Qt's web engine is Chromium, and comes as a wheel.
HAS_BROWSER = (
    PYTHON is not None
    and not subprocess.run(
        [PYTHON, "-c", "import PySide6.QtWebEngineWidgets"], capture_output=True, check=False
    ).returncode
)
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason=REASON),
    pytest.mark.skipif(not HAS_BROWSER, reason="no PySide6 beside MONAI Label to look at the page with"),
]

DRIVER = """
import json, os, sys
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"
from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

url, folder, width, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
app = QApplication(sys.argv[:1])
said = []

class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        said.append(message)

    def javaScriptConfirm(self, origin, message):
        return True

view = QWebEngineView()
view.setPage(Page(view))
view.resize(width, 1000)
view.show()

def pause(ms):
    loop = QEventLoop()
    QTimer.singleShot(ms, loop.quit)
    loop.exec()

def run(code):
    loop, got = QEventLoop(), []
    view.page().runJavaScript(code, 0, lambda value: (got.append(value), loop.quit()))
    QTimer.singleShot(30000, loop.quit)
    loop.exec()
    return got[0] if got else None

loop = QEventLoop()
view.loadFinished.connect(lambda ok: loop.quit())
view.load(QUrl(url))
QTimer.singleShot(60000, loop.quit)
loop.exec()
results = []
for name, act, until in steps:  # what to do, then what to wait for
    if act:
        run(act)
    value = None
    for _ in range(600):
        value = run(until)
        if value:
            break
        pause(250)
    results.append([name, value])
    pause(300)
    view.grab().save(os.path.join(folder, f"{name}-{width}.png"))
print(json.dumps({"results": results, "said": said}))
"""
TEXT = "document.getElementById({!r}).textContent"
FILL = "document.forms[0].patients.value = {!r}; document.forms[0].method.value = 'saliency';"
PRESS = "document.querySelector('button[name={}]').click();"


def _drive(server: Server, folder: Path, steps: list[tuple[str, str, str]], width: int = 1280) -> dict[str, Any]:
    assert PYTHON is not None
    command = [PYTHON, "-c", DRIVER, f"{server.url}/unlearn/page", str(folder), str(width), json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_person_forgets_a_patient_on_the_page(tmp_path: Path) -> None:
    write_studies(tmp_path / "studies", patients=40, size=16)
    with Server(tmp_path / "studies") as server:
        assert server.train("opacity", {"max_epochs": 12})["status"] == "DONE"
        message = TEXT.format("message")
        steps = [
            (
                "empty",
                "",
                f"{TEXT.format('cards')}.includes('0001') && document.getElementById('method').options.length",
            ),
            ("unknown", FILL.format("PAT-<b>") + PRESS.format("dry"), f"{message}.includes('not in the datastore')"),
            ("meant", FILL.format("PAT-0003") + PRESS.format("dry"), f"{message}.includes('2 images of 1 patient.')"),
            ("asked", FILL.format("PAT-0003") + PRESS.format("go"), "document.querySelectorAll('#requests tr').length"),
            (
                "served",
                "",
                "document.querySelector('#requests .state.served') && document.querySelectorAll('#versions tr').length",
            ),
            (
                "back",
                "document.getElementById('rollback').click()",
                "document.querySelector('#requests .state.failed') && 1",
            ),
        ]
        found = _drive(server, tmp_path, steps)
        assert dict(found["results"]) == {
            "empty": 5,
            "unknown": True,
            "meant": True,
            "asked": 1,
            "served": 2,
            "back": 1,
        }
        assert not [line for line in found["said"] if "Error" in line and "404" not in line], found["said"]
        wide = "(document.documentElement.scrollWidth <= window.innerWidth ? 'fits' : 'too wide')"
        narrow = _drive(server, tmp_path, [("phone", "", f"document.querySelector('#requests tr') && {wide}")], 390)
        assert narrow["results"] == [["phone", "fits"]]
    if os.environ.get("MONAI_UNLEARN_SCREENSHOTS"):
        for image in tmp_path.glob("*.png"):
            shutil.copy(image, os.environ["MONAI_UNLEARN_SCREENSHOTS"])
