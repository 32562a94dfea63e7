"""The judge of all choices, against slow loops; and that it changes nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import checked_bundle, easy_images, with_patients
from monai.bundle import ConfigParser
from sklearn.metrics import roc_auc_score
from torch import nn

import monai_unlearn.selection
from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.cost import Cost
from monai_unlearn.data import ImageData, LabeledImages, Split, make_split
from monai_unlearn.evaluation import evaluate
from monai_unlearn.run import Run
from monai_unlearn.selection import NotComparableError, SelectionJudge, judge_of

NETWORK = (
    "$torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(.3), "
    "torch.nn.AdaptiveAvgPool2d((3, 1)), torch.nn.Flatten(), torch.nn.Linear(12, @data.num_classes))"
)


def _run(data: ImageData, split: Split, files: tuple[str, ...] = ("saliency",)) -> Run:
    if files == ("saliency",):
        bundle = checked_bundle("saliency", device="cpu", network_def=NETWORK)
    else:
        configs = [str(bundle_path(name)) for name in files]
        parser = ConfigParser(ConfigParser.load_config_files(configs))
        parser.update({"device": "cpu", "network_def": NETWORK})
        bundle = Bundle(parser, ConfigParser.load_config_files(configs))
    bundle.share(data=data, split=split)
    return Run.start(bundle)


def _part(patients: int, seed: int, **columns: Any) -> LabeledImages:
    images, labels = easy_images(5 * patients, seed)
    names = np.repeat([f"P{seed}-{i}" for i in range(patients)], 5)
    return LabeledImages(images, labels, pd.DataFrame({"patient": names, **columns}))


def _by_sex() -> ImageData:
    """Images of both sexes; a network can tell them by a corner."""

    def part(patients: int, seed: int) -> LabeledImages:
        return _part(patients, seed, sex=np.resize(["f", "f", "m"], patients).repeat(5), age=np.arange(5 * patients))

    return ImageData("by sex", ("a", "b", "c"), part(12, 0), part(16, 1), part(4, 2))


def _network(run: Run, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    network = run.bundle.build("network")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return network.train()


def _logits(run: Run, network: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs on a part of the data, image by image."""
    part, rows = run.parts()[name]
    outputs = []
    network.eval()
    with torch.no_grad():
        for row in rows:
            image = torch.from_numpy(part.images[row]).float()[None, None] / 127.5 - 1
            outputs.append(network(image)[0].double())
    return torch.stack(outputs), torch.from_numpy(part.labels[rows])


def _auc_by_hand(scores: list[list[float]], strata: list[list[Any]]) -> float:
    """Pairs counted one by one; an unseen image counts as often as forget images of its stratum share one like it."""
    above = total = 0.0
    for score, stratum in zip(scores[0], strata[0]):
        for other, its in zip(scores[1], strata[1]):
            members = sum(s == its for s in strata[0])
            if stratum not in strata[1] or not members:
                continue
            weight = members / strata[1].count(its)
            total += weight
            above += weight * ((score > other) + 0.5 * (score == other))
    return above / total


def test_auc_and_utility_are_those_of_loops_over_images() -> None:
    data = _by_sex()
    run = _run(data, replace(make_split(data, 0, 0.3), named_columns=("sex",)))
    judge, network = SelectionJudge(run), _network(run)
    judgement = judge.evaluate(network)
    scores: list[list[float]] = []
    strata: list[list[Any]] = []
    for name in ("forget", "selection"):
        logits, labels = _logits(run, network, name)
        others = [[value for c, value in enumerate(row) if c != y] for row, y in zip(logits.tolist(), labels.tolist())]
        scores.append(
            [
                row[y] - math.log(sum(math.exp(v) for v in rest))
                for row, y, rest in zip(logits.tolist(), labels.tolist(), others)
            ]
        )
        part, rows = run.parts()[name]
        strata.append([(int(part.labels[row]), part.attributes["sex"][row]) for row in rows])
        if name == "selection":
            assert judgement.utility == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert judgement.auc == pytest.approx(_auc_by_hand(scores, strata))
    assert judgement.distinguishability == pytest.approx(abs(2 * judgement.auc - 1))
    assert judge.matched_on == ("class", "sex")
    assert judge.n_unseen == sum(stratum in strata[0] for stratum in strata[1])
    assert judge.n_forget == sum(stratum in strata[1] for stratum in strata[0])
    assert judge.n_unseen_people == len(
        {data.validation.patients[row] for row, stratum in zip(run.split.selection, strata[1]) if stratum in strata[0]}
    )
    assert judge.unmatched == ()
    # Unmatched, the AUC is another: the test above would not see that matching did nothing otherwise.
    plain = roc_auc_score([1] * len(scores[0]) + [0] * len(scores[1]), scores[0] + scores[1])
    assert abs(plain - judgement.auc) > 1e-4


def test_only_one_sex_is_forgotten_and_only_that_one_is_compared() -> None:
    data = _by_sex()
    women = np.flatnonzero(data.train.attributes["sex"] == "f")
    split = make_split(data, 0, 0.3)
    split = replace(split, forget=women, retain=np.setdiff1d(np.arange(60), women), named_columns=("sex",))
    judge = SelectionJudge(_run(data, split))
    assert judge.n_unseen == int((data.validation.attributes["sex"].iloc[split.selection] == "f").sum())
    assert judge.covered == 1


def test_multi_label() -> None:
    def findings(part: LabeledImages) -> LabeledImages:
        labels = np.stack([part.labels == 0, part.labels == 1], axis=1).astype(np.float32)
        labels[::7, 0] = np.nan
        labels[::11] = np.nan
        return LabeledImages(part.images, labels, part.attributes)

    data = with_patients()
    data = ImageData("findings", ("p", "q"), *(findings(part) for part in (data.train, data.validation, data.test)))
    assert data.multi_label
    run = _run(data, make_split(data, 0, 0.4), ("saliency", "multi_label"))
    judge, network = SelectionJudge(run), _network(run)
    judgement = judge.evaluate(network)
    scores: list[list[float]] = []
    strata: list[list[Any]] = []
    for name in ("forget", "selection"):
        logits, labels = _logits(run, network, name)
        score, stratum = [], []
        for row, truth in zip(logits.tolist(), labels.tolist()):
            signed = [(2 * y - 1) * v for v, y in zip(row, truth) if not math.isnan(y)]
            if signed:
                score.append(sum(signed) / len(signed))
                stratum.append(min(3, sum(y > 0.5 for y in truth)))
        scores.append(score)
        strata.append(stratum)
        if name == "selection":
            known = [~torch.isnan(labels[:, c]) for c in range(2)]
            aurocs = [roc_auc_score(labels[k, c], logits[k, c]) for c, k in enumerate(known)]
            assert judgement.utility == pytest.approx(np.mean(aurocs))
    assert judgement.auc == pytest.approx(_auc_by_hand(scores, strata))
    assert judge.n_unseen == len(scores[1])


def test_the_interval_draws_whole_patients() -> None:
    """Five equal images a patient: by images the interval would be √5 shorter than by patients."""
    data = with_patients()
    split = make_split(data, 0, 0.5)
    run = _run(data, split)
    judgement = SelectionJudge(run, resamples=400).evaluate(_network(run))
    scores = [result.scores for result in (judgement.forget, judgement.selection)]
    strata = [result.labels.tolist() for result in (judgement.forget, judgement.selection)]
    people = [
        run.data.train.patients[split.forget].tolist(),
        run.data.validation.patients[split.selection].tolist(),
    ]
    chance = random.Random(0)
    drawn = []
    for _ in range(150):
        rows = []
        for side in people:
            names = sorted(set(side))
            chosen = [chance.choice(names) for _ in names]
            rows.append([i for name in chosen for i, other in enumerate(side) if other == name])
        drawn.append(
            _auc_by_hand(
                [[float(side[i]) for i in chosen] for side, chosen in zip(scores, rows)],
                [[side[i] for i in chosen] for side, chosen in zip(strata, rows)],
            )
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert judgement.low < judgement.auc < judgement.high
    assert judgement.high - judgement.low == pytest.approx(high - low, rel=0.3)


def test_without_a_second_patient_or_resamples_there_is_no_interval() -> None:
    data = with_patients()
    one = replace(make_split(data, 0, 0.3), forget=np.arange(5), retain=np.arange(5, 60))
    run = _run(data, one)
    network = _network(run)
    judgements = [SelectionJudge(run).evaluate(network), SelectionJudge(run, resamples=0).evaluate(network)]
    for judgement in judgements:
        assert math.isnan(judgement.low)
        assert math.isnan(judgement.high)
        assert 0 <= judgement.auc <= 1


def test_nothing_is_changed_and_nothing_depends_on_judging() -> None:
    data = with_patients()
    run = _run(data, make_split(data, 0, 0.3))
    network = _network(run)
    network[1].eval()  # a policy may hold BatchNorm there while the network trains
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    judge = SelectionJudge(run)
    first = judge.evaluate(network)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    second = judge.evaluate(network)
    assert (first.auc, first.low, first.high, first.utility) == (second.auc, second.low, second.high, second.utility)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_modes_come_back_after_an_error() -> None:
    data = with_patients()
    run = _run(data, make_split(data, 0, 0.3))
    network = _network(run)
    network[1].eval()
    modes = [module.training for module in network.modules()]
    with torch.no_grad():
        network[-1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="should be finite"):
        SelectionJudge(run).evaluate(network)
    assert [module.training for module in network.modules()] == modes


def test_the_cost_is_on_the_judge_s_clock_and_not_on_the_evaluation_s() -> None:
    data = with_patients()
    run = _run(data, make_split(data, 0, 0.3))
    judge = SelectionJudge(run)
    assert judge.cost == Cost()
    network, evaluation = _network(run), run.evaluation.samples
    judge.evaluate(network)
    judge.evaluate(network)
    images = len(run.split.forget) + len(run.split.selection)
    assert (judge.cost.samples, judge.cost.forward, judge.cost.backward) == (2 * images, 2 * images, 0)
    assert judge.cost.seconds > 0
    assert run.evaluation.samples == evaluation


def test_only_forget_and_selection_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_patients()
    run = _run(data, make_split(data, 0, 0.3))
    seen: dict[str, list[int]] = {}

    def recording(evaluator: Any, network: nn.Module, loaders: Any, names: Any) -> Any:
        for name, loader in loaders.items():
            seen[name] = torch.cat([batch["index"] for batch in loader]).tolist()
        return evaluate(evaluator, network, loaders, names)

    monkeypatch.setattr(monai_unlearn.selection, "evaluate", recording)
    SelectionJudge(run).evaluate(_network(run))
    assert seen == {"forget": run.split.forget.tolist(), "selection": run.split.selection.tolist()}


def test_of_a_large_forget_set_some_are_looked_at() -> None:
    data = with_patients()
    run = _run(data, make_split(data, 0, 0.5))
    network = _network(run)
    judgements = [SelectionJudge(run, most_forget=12).evaluate(network) for _ in range(2)]
    assert judgements[0].forget.n == 12 < len(run.split.forget)
    assert judgements[0].auc == judgements[1].auc
    whole = SelectionJudge(run, most_forget=None).evaluate(network)
    assert whole.forget.n == len(run.split.forget)
    assert set(judgements[0].forget.scores) <= set(whole.forget.scores)


@pytest.mark.parametrize("fraction", [0.1, 0.6])
def test_the_judge_of_a_budget_looks_at_no_more_forget_images_than_unseen_ones(fraction) -> None:
    data = with_patients()
    split = make_split(data, 0, fraction)
    judge = judge_of(_run(data, split))
    assert judge is not None
    n_forget, n_unseen = len(split.forget), len(split.selection)
    assert (n_forget > n_unseen) == (fraction > 0.5)
    assert judge.samples == min(n_forget, n_unseen) + n_unseen


def test_columns_that_unseen_images_lack_are_said() -> None:
    data = with_patients()
    judge = SelectionJudge(_run(data, replace(make_split(data, 0, 0.3), named_columns=("difficulty",))))
    assert judge.matched_on == ("class",)
    assert judge.unmatched == ("difficulty",)


def test_too_little_to_judge_by() -> None:
    data = with_patients()
    split = make_split(data, 0, 0.3)
    few = replace(split, selection=split.selection[:9])
    with pytest.raises(NotComparableError, match=r"at least 10 .* of 9 images 9 are comparable, to 100 %"):
        SelectionJudge(_run(data, few))
    assert SelectionJudge(_run(data, few), fewest=9).n_unseen == 9
    # Twenty images, but of another class than nearly all of the forget set.
    labels = data.validation.labels[split.selection]
    other = replace(
        split,
        forget=np.flatnonzero(data.train.labels == 1),
        retain=np.flatnonzero(data.train.labels != 1),
        selection=split.selection[labels != 1],
    )
    with pytest.raises(NotComparableError, match="0 are comparable, to 0 % of the forget set"):
        SelectionJudge(_run(data, other))


@pytest.mark.parametrize(
    ("argument", "value"), [("resamples", -1), ("resamples", True), ("most_forget", 0), ("fewest", 0), ("fewest", 1.5)]
)
def test_arguments_that_make_no_sense(argument: str, value: Any) -> None:
    data = with_patients()
    with pytest.raises(ValueError, match=f"{argument} should be a whole number"):
        SelectionJudge(_run(data, make_split(data, 0, 0.3)), **{argument: value})
