"""What the MONAI Label app costs: latency of /infer beside an unlearning, and the server's memory after 30 requests.

    MONAI_UNLEARN_LABEL_PYTHON=label/bin/python python benchmarks/label.py

It starts a real server on loopback with generated DICOM files (``tests/label/studies.py``); about ten minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "label"))

from server import PYTHON, REASON, Server
from studies import write_studies

CALLS = 60
REQUESTS = 30
# The server answers in up to 40 threads, started when calls come at once; their memory stays, so that it comes before.
AT_ONCE, WARM_UP = 64, 1000


def main() -> None:
    """Measure and print."""
    if PYTHON is None:
        sys.exit(REASON)
    with tempfile.TemporaryDirectory() as folder:
        studies = write_studies(Path(folder) / "studies", patients=120, size=64)
        with Server(studies) as server:
            if server.train("opacity", {"max_epochs": 4})["status"] != "DONE":
                sys.exit("The training failed; see the server's log.")
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda call: server.infer(_image(call)), range(WARM_UP)))
            alone = _latencies(server, CALLS)
            _, task = server.call("POST", "/train/unlearn", {"patients": "PAT-0000", "budget": 5.0})
            server.until(task["unlearning"]["id"], "unlearning")
            beside = []
            while server.get(f"/unlearn/{task['unlearning']['id']}")["state"] == "unlearning" and len(beside) < CALLS:
                beside += _latencies(server, 1)
            server.wait(task["id"])
            memory = [_memory(server)]
            for number in range(1, REQUESTS + 1):
                body = {"patients": f"PAT-{number:04d}", "method": "saliency", "epochs": 1}
                _, task = server.call("POST", "/train/unlearn", body)
                server.wait(task["id"])
                _latencies(server, 3)  # the new version is loaded
                memory.append(_memory(server))
            served = server.get("/unlearn/")["served"]["name"]
    print(f"/infer, nothing else at work: {_said(alone)}")
    print(f"/infer beside an unlearning:  {_said(beside)}")
    print(
        f"Resident memory of the server in MB, before and after each of {REQUESTS} requests (version {served} served):"
    )
    print("  " + " ".join(f"{value:.0f}" for value in memory))


def _latencies(server: Server, calls: int) -> list[float]:
    found = []
    for call in range(calls):
        begun = time.perf_counter()
        server.infer(_image(call))
        found.append(time.perf_counter() - begun)
    return found


def _image(call: int) -> str:
    return f"scan{50 + call % 50:04d}a"


def _said(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"too few calls ({len(seconds)})"
    ordered = sorted(1000 * value for value in seconds)
    return (
        f"median {statistics.median(ordered):.0f} ms, 95th percentile {ordered[int(0.95 * (len(ordered) - 1))]:.0f} ms "
        f"({len(ordered)} calls)"
    )


def _memory(server: Server) -> float:
    if server.process is None:
        return float("nan")
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


if __name__ == "__main__":
    main()
