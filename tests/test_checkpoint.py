"""Checkpoints: every form, strictly read, written in the form they came in."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch import nn

from monai_unlearn.checkpoint import Checkpoint, file_hash, load_checkpoint, save_atomically

MakeNetwork = Callable[..., nn.Module]


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def _save(content: object, folder: Path) -> Path:
    torch.save(content, folder / "original.pt")
    return folder / "original.pt"


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("form", "given"),
    [(None, None), ("model", None), ("network", None), ("net", None), ("state_dict", None), ("ema", "ema")],
)
def test_every_form_comes_back_with_another_state_and_nothing_else(
    make_network: MakeNetwork, tmp_path: Path, form: str | None, given: str | None, prefix: str
) -> None:
    network = make_network(seed=1)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.zeros(2, 1, 6, 6)).sum().backward()
    optimizer.step()
    state = {name: value.clone() for name, value in state.items()}
    surplus = {"optimizer": optimizer.state_dict(), "epoch": 7, "best": {"accuracy": 0.9}}
    checkpoint = load_checkpoint(_save(state if form is None else {**surplus, form: state}, tmp_path), given)
    assert (checkpoint.key, checkpoint.prefix) == (form, prefix)
    plain = {name.removeprefix(prefix): value for name, value in state.items()}
    assert _same(checkpoint.state_dict, plain)

    loaded = make_network(seed=2)
    checkpoint.load_into(loaded)
    assert _same(loaded.state_dict(), plain)

    unlearned = make_network(seed=3)
    written = checkpoint.with_state_of(unlearned)
    inner = written if form is None else written[form]
    assert form is None or set(written) == {form}
    assert list(inner) == list(state)
    assert _same({name.removeprefix(prefix): value for name, value in inner.items()}, unlearned.state_dict())

    again = load_checkpoint(_save(written, tmp_path), given)
    assert (again.key, again.prefix) == (form, prefix)
    assert _same(again.state_dict, unlearned.state_dict())


def test_the_first_known_key_is_taken_unless_another_is_named(make_network: MakeNetwork, tmp_path: Path) -> None:
    states = {name: make_network(seed=seed).state_dict() for seed, name in enumerate(("state_dict", "net", "model"))}
    path = _save(states, tmp_path)
    assert load_checkpoint(path).key == "model"
    for name, state in states.items():
        assert _same(load_checkpoint(path, name).state_dict, state)


def test_the_unlearned_state_is_no_view_of_the_network(make_network: MakeNetwork, tmp_path: Path) -> None:
    network = make_network()
    written = load_checkpoint(_save(network.state_dict(), tmp_path)).with_state_of(network)
    assert all(not value.requires_grad and value.is_contiguous() for value in written.values())
    assert not any(isinstance(value, nn.Parameter) for value in written.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_each_entry_is_kept(make_network: MakeNetwork, tmp_path: Path, dtype: torch.dtype) -> None:
    state = make_network().to(dtype).state_dict()
    checkpoint = load_checkpoint(_save(state, tmp_path))
    network = make_network(seed=1)
    checkpoint.load_into(network)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32, torch.int64}
    written = checkpoint.with_state_of(network)
    assert {name: value.dtype for name, value in written.items()} == {name: v.dtype for name, v in state.items()}
    assert _same(written, state)  # nothing was unlearned, so nothing changed on the way


def test_a_distributed_network_is_read_without_its_prefix(make_network: MakeNetwork, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch was built without torch.distributed")
    network = make_network()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        checkpoint = load_checkpoint(_save({"model": wrapped.state_dict()}, tmp_path))
        rewritten = checkpoint.with_state_of(make_network(seed=5))
        wrapped.load_state_dict(rewritten["model"])
    finally:
        torch.distributed.destroy_process_group()
    assert checkpoint.prefix == "module."
    assert _same(network.state_dict(), make_network(seed=5).state_dict())


def test_a_network_with_a_part_named_module_has_no_prefix(tmp_path: Path) -> None:
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    checkpoint = load_checkpoint(_save(network.state_dict(), tmp_path))
    assert checkpoint.prefix == ""
    assert _same(checkpoint.state_dict, network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("1.running_var"),
            r"1 entries are missing, 0 unknown, 0 of another .*1\.running_var is missing",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "0 entries are missing, 1 unknown, 0 of .*extra is unknown"),
        (
            lambda s: s.update({"5.weight": torch.zeros(2, 4), "5.bias": torch.zeros(2)}),
            r"2 of another shape \(first: 5\.weight is \(2, 4\) in the checkpoint and \(3, 4\) here\)",
        ),
        (lambda s: s.update({"0.weight": torch.zeros(4, 3, 3, 3)}), r"0\.weight is \(4, 3, 3, 3\) in the checkpoint"),
    ],
)
def test_the_state_of_another_network_is_refused_with_the_first_difference(
    make_network: MakeNetwork, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    state = dict(make_network(seed=1).state_dict())
    change(state)
    network = make_network(seed=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(_save(state, tmp_path)).load_into(network)
    assert "network_def" in str(error.value)
    assert _same(network.state_dict(), before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt' does not exist"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("new", [True, False])
def test_a_truncated_file_is_called_damaged_wherever_it_ends(
    make_network: MakeNetwork, tmp_path: Path, new: bool
) -> None:
    path = tmp_path / "original.pt"
    torch.save({"model": make_network().state_dict()}, path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    for end in {0, 1, 10, *range(0, len(content), 97)}:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"original\.pt could not be read as a checkpoint. It is damaged"):
            load_checkpoint(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("new", [True, False])
def test_a_changed_byte_raises_nothing_but_a_value_error(make_network: MakeNetwork, tmp_path: Path, new: bool) -> None:
    path = tmp_path / "original.pt"
    torch.save({"model": make_network().state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=new)
    intact = path.read_bytes()
    read = 0
    for position in range(0, len(intact), 9):
        content = bytearray(intact)
        content[position] ^= 0x20
        path.write_bytes(content)
        with suppress(ValueError):
            load_checkpoint(path)
            read += 1
    assert 0 < read < len(intact) / 9


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint at all", bytes(range(256)) * 9, b"PK\x03\x04", b"\x80\x02"]
)
def test_what_is_no_checkpoint_is_called_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "original.pt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "original.pt")


class _Intruder:
    """Code in a file: unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_refused_and_not_run(make_network: MakeNetwork, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = _save({"model": make_network().state_dict(), "epoch": _Intruder(trace)}, tmp_path)
    with pytest.raises(ValueError, match="loading it would run code") as error:
        load_checkpoint(path)
    assert "network.state_dict()" in str(error.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)["epoch"].close()
    assert trace.exists()  # it would have run


def test_a_whole_network_in_a_file_is_refused(make_network: MakeNetwork, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_checkpoint(_save(make_network(), tmp_path))


@pytest.mark.parametrize(
    ("content", "there"),
    [
        ({}, r"\[\]"),
        ({"model": {}}, r"\[\]"),
        ({"model": None, "epoch": 3}, r"\['epoch', 'model'\]"),
        ({"optimizer": {"lr": 0.1}}, r"\['optimizer'\]"),
        ({"encoder": {"weight": torch.zeros(1)}}, r"\['encoder'\]"),
        ({0: torch.zeros(1)}, r"\['0'\]"),
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "list"),
        (3, "int"),
    ],
)
def test_a_file_without_a_network_says_what_it_holds(tmp_path: Path, content: object, there: str) -> None:
    with pytest.raises(ValueError, match=rf"holds no network state .* it holds {there}.*--network_key"):
        load_checkpoint(_save(content, tmp_path))


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}, "epoch": 3}, {"a": torch.zeros(1)}])
def test_a_wrong_key_says_what_is_there(tmp_path: Path, content: dict) -> None:
    with pytest.raises(ValueError, match=r"has no 'generator'; it holds \[.*--network_key"):
        load_checkpoint(_save(content, tmp_path), "generator")


def test_a_key_that_holds_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no network state"):
        load_checkpoint(_save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path), "epoch")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_weights_that_are_not_finite_are_refused(
    make_network: MakeNetwork, tmp_path: Path, name: str, value: float
) -> None:
    network = make_network()
    network.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match="1 tensors hold NaN or infinity"):
        load_checkpoint(_save({"model": network.state_dict()}, tmp_path))


@pytest.mark.parametrize("alone", [True, False])
def test_what_monais_saver_wrote_comes_back_for_monais_loader(
    make_network: MakeNetwork, make_trainer: Callable[..., SupervisedTrainer], tmp_path: Path, alone: bool
) -> None:
    network = make_network()
    trainer = make_trainer(network=network)
    objects = (
        {"network": network} if alone else {"network": network, "optimizer": trainer.optimizer, "trainer": trainer}
    )
    CheckpointSaver(save_dir=str(tmp_path), save_dict=objects, save_final=True, final_filename="model.pt").attach(
        trainer
    )
    trainer.run()

    checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert checkpoint.key == (None if alone else "network")
    assert _same(checkpoint.state_dict, network.state_dict())

    unlearned = make_network(seed=8)
    save_atomically(checkpoint.with_state_of(unlearned), tmp_path / "unlearned_model.pt")
    users = make_network(seed=9)
    loader = CheckpointLoader(load_path=str(tmp_path / "unlearned_model.pt"), load_dict={"network": users})
    make_trainer([loader], network=users, optimizer=torch.optim.SGD(users.parameters(), lr=0.0)).run()
    for name, parameter in users.named_parameters():
        assert torch.equal(parameter, unlearned.state_dict()[name]), name


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, size: int) -> None:
    resource = pytest.importorskip("resource", reason="files can't be limited in size here")
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.ones(1)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_atomically({"a": torch.zeros(size)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_file_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for value in (1, 2):
        save_atomically({"a": torch.full((1,), value)}, str(path))
        assert int(load_checkpoint(path).state_dict["a"]) == value
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
@pytest.mark.parametrize("old", [False, True])
def test_the_hash_of_a_file_is_its_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, old: bool
) -> None:
    content = (b"monai" * (size // 5 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    if old:  # Python 3.10
        monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert file_hash(tmp_path / "file") == expected
    assert re.fullmatch("[0-9a-f]{64}", expected)


def test_names_and_shapes_are_checked_before_anything_is_loaded(make_network: MakeNetwork) -> None:
    with pytest.raises(ValueError, match="The checkpoint is of another network: 9 entries are missing, 0 unknown"):
        Checkpoint({}).load_into(make_network())
