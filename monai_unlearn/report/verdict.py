"""The audit's verdict in words: what the tests say, and what they could not have seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai_unlearn.report.numbers import count, counted

__all__ = ["headline", "limit", "meaning", "verdict_line"]


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in one line, without a full stop. It never says more than that these tests saw no difference."""
    verdict = report["audit"]["verdict"]
    others = _others(report)
    if verdict["answer"] == "equivalent":
        return f"Not distinguished from {others} by these tests"
    if verdict["answer"] == "different":
        ways = {
            "remembers": f"Distinguished from {others}: part of what was learned can still be seen",
            "over-forgets": f"Over-forgetting: distinguished from {others} by scoring worse",
        }
        return ways.get(verdict["direction"], f"Distinguished from {others}")
    return {
        "inconclusive": "Inconclusive",
        "not comparable": "Not comparable: there is no yardstick for this request",
        "powerless": "Powerless: these tests could not have seen a difference",
    }[verdict["answer"]]


def limit(report: Mapping[str, Any]) -> str:
    """How many images the verdict rests on, and the smallest difference that they could show."""
    audit = report["audit"]
    forget, detectable = audit["attacks"]["forget"], audit["verdict"]["detectable"]
    text = f"n = {count(forget['images'])}"
    if forget["patients"] is not None:
        text = f"n = {counted(forget['images'], 'image')} of {counted(forget['patients'], 'patient')}"
    if detectable is None:
        return text
    if detectable >= 0.5:
        return f"{text}; not even two models that differ in everything would have been told apart"
    return f"{text}; a difference of AUC below {_small(detectable)} would not have been seen"


def meaning(report: Mapping[str, Any]) -> str | None:
    """What the verdict means for a reader who has not met the word, where its reason leaves that open."""
    verdict = report["audit"]["verdict"]
    if verdict["answer"] == "powerless":
        return "That nothing was seen is no evidence then, neither that a trace is left nor that none is."
    if verdict["answer"] == "not comparable":
        return "An attack near 0.5 shows nothing then, nor does one far from it."
    if verdict["answer"] != "different":
        return None
    others = "images that were never seen"
    if report["models"]["retrained"] is not None:
        others = "they would had the model never seen them"
    if verdict["direction"] == "over-forgets":
        return (
            f"The images to be forgotten score worse than {others}. That gives them away as much as scoring better "
            "would."
        )
    if verdict["direction"] == "remembers":
        return f"The images to be forgotten score better than {others}."
    return "An attacker can tell that these images were treated in a special way."


def verdict_line(report: Mapping[str, Any]) -> str:
    """The verdict and the noise floor in one line for a terminal."""
    verdict, distance = report["audit"]["verdict"], report["audit"]["distance"]
    words = verdict["answer"]
    if words == "equivalent":
        words = f"not distinguished from {_others(report)}"
    elif words == "different":
        words = f"differs from {_others(report)}" + (f": {verdict['direction']}" if verdict["direction"] else "")
    line = f"Verdict: {words} (n = {count(report['audit']['attacks']['forget']['images'])}"
    if verdict["detectable"] is not None:
        line += f"; below {_small(verdict['detectable'])} of AUC unseen"
    floor = None if distance is None else distance["average_gap"]["floor"]
    return line + ")" + ("" if floor is None else f"; noise floor {floor:.1f} points")


def _others(report: Mapping[str, Any]) -> str:
    return "unseen images" if report["models"]["retrained"] is None else "the retrained model"


def _small(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"
