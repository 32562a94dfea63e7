"""The forget set: which rows and samples it names, how these are loaded, and that it never shows an id."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, IterableDataset, PatchDataset
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import list_data_collate
from monai.transforms import Compose, EnsureTyped, LoadImaged, MapTransform, RandGaussianNoised
from torch.utils.data import BatchSampler, RandomSampler, Subset, WeightedRandomSampler

from monai_unlearn import ForgetSet

PATIENT = "Jane Doe 1970"
IS_FORGET = [i // 5 in (0, 3) for i in range(30)]


@pytest.fixture
def data(records):
    return Dataset(records, Compose([EnsureTyped("image")]))


@pytest.fixture
def forget():
    return ForgetSet(["P0", "P3"], key="patient")


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(batches):
    return [i for batch in batches for i in batch]


# ---- rows of a batch


@pytest.mark.parametrize(
    "ids",
    [[1, 3], (3, 1, 1), {1, 3}, np.array([1, 3]), [np.int32(1), np.uint8(3)], torch.tensor([1, 3]),
     [torch.tensor(1), torch.tensor(3)], range(1, 4, 2)],
    ids=["list", "tuple", "set", "array", "numpy_scalars", "tensor", "tensor_scalars", "range"],
)  # fmt: skip
@pytest.mark.parametrize(
    "values",
    [torch.tensor([0, 1, 2, 3, 1]), torch.tensor([[0], [1], [2], [3], [1]]),
     torch.tensor([0, 1, 2, 3, 1], dtype=torch.int16),
     torch.tensor([0.0, 1, 2, 3, 1]), [0, 1, 2, 3, 1], np.array([0, 1, 2, 3, 1]), MetaTensor([0, 1, 2, 3, 1])],
    ids=["vector", "column", "int16", "float", "list", "array", "meta_tensor"],
)  # fmt: skip
def test_integer_ids_are_recognised(ids, values) -> None:
    mask = ForgetSet(ids).mask({"index": values})
    assert mask.dtype == torch.bool
    assert mask.tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("ids", [["a", "c"], np.array(["a", "c"]), {"a": 1, "c": 2}.keys()])
@pytest.mark.parametrize("values", [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"])])
def test_string_ids_are_recognised(ids, values) -> None:
    assert ForgetSet(iter(ids), key="name").mask({"name": values}).tolist() == [True, False, True]
    assert ForgetSet(ids, key="name").mask({"name": values}).tolist() == [True, False, True]


def test_ids_of_several_types_are_recognised() -> None:
    forget = ForgetSet(["a", 2, ("study", 5)], key="id")
    assert forget.mask({"id": ["a", 2, ("study", 5), "2", ("study", 6)]}).tolist() == [True, True, True, False, False]
    assert forget.mask({"id": torch.tensor([1, 2])}).tolist() == [False, True]


def test_numbers_and_strings_are_not_confused() -> None:
    assert ForgetSet(["1"]).mask({"index": torch.tensor([1, 2])}).tolist() == [False, False]
    assert ForgetSet([1]).mask({"index": ["1", "2"]}).tolist() == [False, False]


@pytest.mark.parametrize(
    "values",
    [torch.tensor([True, False, True]), torch.tensor([[1], [0], [1]]), torch.tensor([1.0, 0.0, 1.0]),
     [True, False, True], np.array([True, False, True])],
)  # fmt: skip
def test_flags_are_recognised(values) -> None:
    assert ForgetSet.flagged().mask({"is_forget": values}).tolist() == [True, False, True]
    assert ForgetSet.flagged("gone").mask({"gone": values}).tolist() == [True, False, True]


@pytest.mark.parametrize("ids", [[], (), np.array([]), iter([])])
def test_no_ids_raise(ids) -> None:
    with pytest.raises(ValueError, match="at least one sample to forget, but got none"):
        ForgetSet(ids)
    with pytest.raises(ValueError, match="at least one sample to forget, but got none"):
        ForgetSet.files(ids)


@pytest.mark.parametrize("ids", [PATIENT, PATIENT.encode()])
def test_a_single_string_raises(ids) -> None:
    with pytest.raises(TypeError, match=r"should be a collection of ids.*Put it in a list") as error:
        ForgetSet(ids)
    assert "Jane" not in str(error.value)


def test_a_batch_that_is_no_dict_raises() -> None:
    with pytest.raises(TypeError, match="A batch should be a dict, but got list"):
        ForgetSet([1]).mask([torch.tensor([1])])


def test_a_batch_without_the_key_names_the_keys_it_has() -> None:
    with pytest.raises(KeyError, match=r"The batch has no 'patient'.*\['image', 'label'\]"):
        ForgetSet([PATIENT], key="patient").mask({"label": 1, "image": 2})


# ---- positions in a data set


@pytest.mark.parametrize("wrap", [list, tuple])
def test_positions_come_from_the_records(wrap, records, forget) -> None:
    assert forget.positions(Dataset(wrap(records))) == [i for i in range(30) if IS_FORGET[i]]


@pytest.mark.parametrize("ids", [[3, 7], np.array([7, 3]), torch.tensor([3, 7])])
@pytest.mark.parametrize("of", [int, np.int64, torch.tensor])
def test_positions_take_ids_and_records_of_any_number_type(records, ids, of) -> None:
    dataset = Dataset([{**record, "index": of(record["index"])} for record in records])
    assert ForgetSet(ids).positions(dataset) == [3, 7]


def test_positions_in_nested_subsets_are_those_of_the_subset(data, forget) -> None:
    subset = Subset(Subset(data, list(range(29, -1, -1))), list(range(0, 30, 3)))
    expected = [i for i, position in enumerate(range(29, -1, -3)) if IS_FORGET[position]]
    assert forget.positions(subset) == expected


def test_flagged_positions(records) -> None:
    dataset = Dataset([{**record, "is_forget": np.bool_(i in (4, 9))} for i, record in enumerate(records)])
    assert ForgetSet.flagged().positions(dataset) == [4, 9]


def test_positions_decode_nothing(records, forget) -> None:
    class Refuse(MapTransform):
        def __call__(self, data):
            raise AssertionError("decoded")

    assert len(forget.positions(Dataset(records, Compose([Refuse("image")])))) == 10


def test_a_request_that_matches_nothing_raises(data) -> None:
    with pytest.raises(ValueError, match="No sample of the training data is in the forget set"):
        ForgetSet([PATIENT], key="patient").positions(data)


def test_a_request_that_matches_in_part_raises(data) -> None:
    with pytest.raises(ValueError, match="2 of the 3 ids to forget are not in the training data"):
        ForgetSet(["P0", PATIENT, "P99"], key="patient").positions(data)


def test_a_request_for_everything_raises(data) -> None:
    with pytest.raises(ValueError, match="retain set should hold at least one sample, but all 30"):
        ForgetSet([f"P{i}" for i in range(6)], key="patient").positions(data)


def test_records_without_the_key_raise(data) -> None:
    with pytest.raises(ValueError, match=r"have no 'study'.*\['image', 'index', 'label', 'patient'\]"):
        ForgetSet([PATIENT], key="study").positions(data)


def test_records_that_are_no_dicts_raise() -> None:
    with pytest.raises(ValueError, match="should be dicts with 'index', but are int"):
        ForgetSet([1]).positions(Dataset([1, 2, 3]))


def test_a_data_set_without_records_raises() -> None:
    with pytest.raises(ValueError, match=r"a TensorDataset, which has no records.*a loader of its own"):
        ForgetSet([1]).positions(torch.utils.data.TensorDataset(torch.zeros(3)))


def test_a_data_set_with_several_samples_a_record_raises(records, forget) -> None:
    patches = PatchDataset(records, lambda record: [record, record], samples_per_image=2)
    with pytest.raises(ValueError, match="Which of its 30 records each of the 60 samples of a PatchDataset"):
        forget.positions(patches)


# ---- file names


@pytest.fixture
def files(tmp_path):
    """Six small NIfTI files: patient0/scan0.nii.gz … patient2/scan1.nii.gz."""
    records = []
    for patient in range(3):
        for scan in range(2):
            path = tmp_path / f"patient{patient}" / f"scan{scan}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), patient, dtype=np.float32), np.eye(4)), path)
            records.append({"image": str(path), "label": patient, "index": 2 * patient + scan})
    return records


def load(records):
    return Dataset(records, Compose([LoadImaged("image", ensure_channel_first=True)]))


def test_files_are_recognised_in_the_metadata_of_loaded_images(files) -> None:
    forget = ForgetSet.files(["patient1/scan0.nii.gz", "patient2/scan1.nii.gz"])
    met = {}
    for batch in DataLoader(load(files), batch_size=4, shuffle=True):
        met.update(zip(batch["index"].tolist(), forget.mask(batch).tolist()))
    assert met == {i: i in (2, 5) for i in range(6)}


def test_files_are_found_among_the_records_and_loaded(files) -> None:
    forget = ForgetSet.files(["patient1/scan0.nii.gz", files[5]["image"]])
    assert forget.positions(load(files)) == [2, 5]
    batches = list(forget.forget_loader(DataLoader(load(files), batch_size=4)))
    assert [int(image.mean()) for batch in batches for image in batch["image"]] == [1, 2]


def test_one_image_that_is_not_collated_is_recognised(files) -> None:
    sample = load(files)[2]
    assert ForgetSet.files(["patient1/scan0.nii.gz"]).mask({"image": sample["image"]}).tolist() == [True]
    assert ForgetSet.files(["patient1/scan1.nii.gz"]).mask({"image": sample["image"]}).tolist() == [False]


@pytest.mark.parametrize(
    ("wanted", "there", "match"),
    [
        ("patient7/scan.nii", "/data/patient7/scan.nii", True),
        ("patient7/scan.nii", "/data/xpatient7/scan.nii", False),
        ("scan.nii", "/data/patient7/scan.nii", True),
        ("can.nii", "/data/patient7/scan.nii", False),
        ("/data/patient7/scan.nii", "/data/patient7/scan.nii", True),
        ("/patient7/scan.nii", "/data/patient7/scan.nii", False),
        ("./patient7/scan.nii", "/data/patient7/scan.nii", True),
        ("old/data/patient7/scan.nii", "data/patient7/scan.nii", False),
        ("patient7/scan.nii", "patient7/scan.nii.gz", False),
    ],
)
def test_a_path_matches_folder_by_folder_from_the_end(wanted, there, match) -> None:
    image = MetaTensor(torch.zeros(1, 1), meta={"filename_or_obj": [there]})
    assert ForgetSet.files([wanted]).mask({"image": image}).tolist() == [match]


def test_path_objects_are_taken(files) -> None:
    assert ForgetSet.files([Path("patient1") / "scan0.nii.gz"]).positions(load(files)) == [2]


def test_another_image_key_is_read(files) -> None:
    records = [{"scan": record["image"]} for record in files]
    assert ForgetSet.files(["patient1/scan0.nii.gz"], image_key="scan").positions(Dataset(records)) == [2]


def test_an_ambiguous_file_name_raises(files) -> None:
    with pytest.raises(ValueError, match="Of 1 files to forget, 0 are not in the training data and 1 match more than"):
        ForgetSet.files(["scan0.nii.gz"]).positions(load(files))


def test_a_missing_file_raises(files) -> None:
    with pytest.raises(ValueError, match="Of 2 files to forget, 1 are not in the training data and 0 match more than"):
        ForgetSet.files(["patient1/scan0.nii.gz", "patient9/scan0.nii.gz"]).positions(load(files))


@pytest.mark.parametrize("image", [torch.zeros(2, 1), MetaTensor(torch.zeros(2, 1))])
def test_images_without_a_file_name_raise(image) -> None:
    with pytest.raises(KeyError, match=r"metadata of 'image' has no file name.*LoadImaged"):
        ForgetSet.files(["a.nii"]).mask({"image": image})


# ---- loaders


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
@pytest.mark.parametrize("training", [True, False])
def test_forget_and_retain_loader_are_disjoint_and_cover_the_data(data, forget, batch_size, training) -> None:
    loader = DataLoader(data, batch_size=batch_size)
    gone, kept = indices(forget.forget_loader(loader)), indices(forget.retain_loader(loader, training=training))
    assert flat(gone) == [i for i in range(30) if IS_FORGET[i]]
    assert flat(kept) == [i for i in range(30) if not IS_FORGET[i]]
    assert max(map(len, gone + kept)) <= batch_size


def test_loaders_of_a_subset_stay_within_it(data, forget) -> None:
    loader = DataLoader(Subset(data, range(3, 18)), batch_size=4)
    assert flat(indices(forget.forget_loader(loader))) == [3, 4, 15, 16, 17]
    assert flat(indices(forget.retain_loader(loader, training=True))) == list(range(5, 15))


def test_shuffling_is_kept_for_training_only(data, forget) -> None:
    def loader():
        return torch.utils.data.DataLoader(
            data, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=list_data_collate
        )

    retain = [i for i in range(30) if not IS_FORGET[i]]
    shuffled = forget.retain_loader(loader(), training=True)
    epochs = [flat(indices(shuffled)) for _ in range(2)]
    assert all(sorted(epoch) == retain != epoch for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert flat(indices(forget.retain_loader(loader(), training=True))) == epochs[0]
    assert flat(indices(forget.retain_loader(loader(), training=False))) == retain
    assert flat(indices(forget.forget_loader(loader()))) == [i for i in range(30) if IS_FORGET[i]]


def test_loading_a_part_does_not_change_the_order_of_the_training(data, forget) -> None:
    orders = []
    for look in (False, True):
        loader = DataLoader(data, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(5))
        random = torch.get_rng_state()
        if look:
            list(forget.forget_loader(loader))
            list(forget.retain_loader(loader, training=False, max_batches=1))
        assert torch.equal(torch.get_rng_state(), random)
        orders.append(indices(loader))
    assert orders[0] == orders[1]


def test_collation_and_batch_size_are_kept(data, forget) -> None:
    loader = DataLoader(
        data, batch_size=3, collate_fn=lambda samples: {"index": torch.tensor([-s["index"] for s in samples])}
    )
    assert indices(forget.forget_loader(loader))[0] == [0, -1, -2]


@pytest.mark.parametrize(
    ("size", "batch_size", "drop_last", "lengths"),
    [
        (20, 8, False, [8, 8, 4]),
        (17, 8, False, [8, 8]),  # a batch of one row is avoided
        (17, 8, True, [8, 8]),
        (20, 8, True, [8, 8]),
        (5, 8, True, [5]),  # rather than nothing
        (9, 3, False, [3, 3, 3]),
        (2, 1, False, [1, 1]),
        (1, 8, False, [1]),
    ],
)
def test_shuffled_training_avoids_a_batch_of_one_row_but_never_all(
    records, size, batch_size, drop_last, lengths
) -> None:
    dataset = Dataset([{"index": i} for i in range(size + 1)])
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=drop_last)
    retain = ForgetSet([size]).retain_loader(loader, training=True)
    assert [len(batch) for batch in indices(retain)] == lengths
    assert len(retain) == len(lengths)


def test_the_sample_left_out_is_another_one_each_epoch(records) -> None:
    loader = DataLoader(Dataset([{"index": i} for i in range(10)]), batch_size=4, shuffle=True)
    retain = ForgetSet([9]).retain_loader(loader, training=True)
    assert len({frozenset(flat(indices(retain))) for _ in range(20)}) > 1


@pytest.mark.parametrize(("max_batches", "size"), [(1, 7), (2, 14), (3, 20), (50, 20), (None, 20)])
def test_max_batches_draws_that_many_samples_with_the_seed(data, forget, max_batches, size) -> None:
    loader = DataLoader(data, batch_size=7)

    def drawn(seed):
        return flat(indices(forget.retain_loader(loader, training=False, max_batches=max_batches, seed=seed)))

    assert len(drawn(0)) == len(set(drawn(0))) == size
    assert drawn(0) == drawn(0) == sorted(drawn(0))
    assert not any(IS_FORGET[i] for i in drawn(0))
    assert (len({tuple(drawn(seed)) for seed in range(5)}) > 1) is (size < 20)


@pytest.mark.parametrize("kind", [Dataset, CacheDataset])
def test_random_transforms_are_kept_for_training_only(records, forget, kind) -> None:
    noise = Compose([RandGaussianNoised("image", prob=1.0, std=5.0)])
    dataset = kind(records, noise) if kind is Dataset else kind(records, noise, progress=False)
    loader = DataLoader(dataset, batch_size=30)
    for part, random in (
        (forget.forget_loader(loader), False),
        (forget.retain_loader(loader, training=False), False),
        (forget.retain_loader(loader, training=True), True),
    ):
        (batch,) = part
        own = torch.stack([records[i]["image"] for i in batch["index"].tolist()])
        assert torch.equal(batch["image"], own) is not random


def drawn_samplers(data):
    return {
        "weighted": WeightedRandomSampler(torch.ones(30), 30),
        "replacement": RandomSampler(data, replacement=True),
        "fewer": RandomSampler(data, num_samples=10),
        "list": list(range(30)),
    }


@pytest.mark.parametrize("name", ["weighted", "replacement", "fewer", "list"])
def test_a_custom_sampler_is_refused_for_training(data, forget, name) -> None:
    loader = DataLoader(data, batch_size=8, sampler=drawn_samplers(data)[name])
    with pytest.raises(ValueError, match=r"can't be made from a .* other than of each sample once.*a loader"):
        forget.retain_loader(loader, training=True)
    assert len(flat(indices(forget.forget_loader(loader)))) == 10
    assert len(flat(indices(forget.retain_loader(loader, training=False)))) == 20


def test_what_is_no_loader_or_has_its_own_batches_is_refused(data, forget) -> None:
    batches = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False))
    for loader in ([{"index": 1}], batches):
        with pytest.raises(ValueError, match=r"can't be loaded one part apart.*a loader of its own"):
            forget.forget_loader(loader)
        with pytest.raises(ValueError, match=r"can't be loaded one part apart.*a loader of its own"):
            forget.retain_loader(loader, training=True)


def test_an_iterable_data_set_is_refused(forget, records) -> None:
    with pytest.raises(ValueError, match="a loader of its own"):
        forget.forget_loader(DataLoader(IterableDataset(records), batch_size=4))


# ---- privacy


def test_no_id_is_shown(records, files) -> None:
    dataset = Dataset([{**record, "patient": PATIENT if i < 5 else f"P{i}"} for i, record in enumerate(records)])
    by_id = ForgetSet([PATIENT, "Jane Roe"], key="patient")
    by_name = ForgetSet.files(["patient1/scan0.nii.gz", "Jane Doe 1970/scan.nii.gz"])
    assert repr(by_id) == str(by_id) == "ForgetSet(2, key='patient')"
    assert repr(by_name) == "ForgetSet(2, key='image')"
    assert repr(ForgetSet.flagged()) == "ForgetSet(flagged, key='is_forget')"
    image = MetaTensor(torch.zeros(1, 1), meta={"filename_or_obj": ["Jane Doe 1970/scan.nii.gz"]})
    failing = [
        lambda: by_id.positions(dataset),
        lambda: by_id.positions(Dataset(dataset.data[:5])),
        lambda: ForgetSet([PATIENT], key="patient").positions(Dataset(dataset.data[:5])),
        lambda: ForgetSet([PATIENT], key="patient").positions(Dataset(dataset.data[5:])),
        lambda: ForgetSet([PATIENT], key="study").positions(dataset),
        lambda: by_id.mask({"image": image}),
        lambda: by_id.mask([PATIENT]),
        lambda: by_name.positions(load(files)),
        lambda: ForgetSet.files(["scan0.nii.gz"]).positions(load(files)),
        lambda: by_name.mask({"image": torch.zeros(1)}),
        lambda: by_id.forget_loader([PATIENT]),
        lambda: ForgetSet([[PATIENT]]),
    ]
    for call in failing:
        with pytest.raises((ValueError, KeyError, TypeError)) as error:
            call()
        assert not re.search("Jane|scan|patient1", str(error.value))


def test_check_finds_what_is_missing_from_the_records(records: list[dict]) -> None:
    loader = DataLoader(Dataset(records), batch_size=4)
    ForgetSet(["P1"], key="patient").check(loader)
    with pytest.raises(ValueError, match="1 of the 2 ids to forget are not in the training data"):
        ForgetSet(["P1", "P99"], key="patient").check(loader)


def test_check_leaves_data_alone_whose_records_do_not_hold_the_key(records: list[dict]) -> None:
    ForgetSet(["P99"], key="made_by_a_transform").check(DataLoader(Dataset(records), batch_size=4))
    ForgetSet(["P99"], key="patient").check([{"patient": ["P1"]}])


def test_a_data_set_with_a_getitem_of_its_own_is_not_taken_for_its_transforms(records: list[dict]) -> None:
    class Doubled(Dataset):
        def __getitem__(self, index: int) -> dict:
            record = super().__getitem__(index)
            return {**record, "image": 2 * record["image"]}

    with pytest.raises(ValueError, match="A Doubled makes its samples in a way of its own"):
        ForgetSet(["P1"], key="patient").forget_loader(DataLoader(Doubled(records), batch_size=4))


def test_a_retain_loader_of_a_retain_loader_has_the_same_samples_and_its_forget_loader_the_forgotten(records) -> None:
    forget = ForgetSet(["P0", "P3"], key="patient")
    whole = DataLoader(Dataset(records), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    once = forget.retain_loader(whole, training=True)
    for training in (True, False):
        again = forget.retain_loader(once, training=training)
        assert sorted(again.dataset.indices) == sorted(once.dataset.indices)
    named = {name for batch in forget.forget_loader(once) for name in batch["patient"]}
    assert named == {"P0", "P3"}


# ---- a forget loader to train on


def test_a_forget_loader_for_training_is_shuffled_as_the_loader_and_in_an_order_of_its_own(data, forget) -> None:
    def loader():
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))

    gone = [i for i in range(30) if IS_FORGET[i]]
    own, random = loader(), torch.get_rng_state()
    part = forget.forget_loader(own, training=True)
    epochs = [flat(indices(part)) for _ in range(3)]
    assert all(sorted(epoch) == gone for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [flat(indices(forget.forget_loader(loader(), training=True)))] == epochs[:1]
    assert torch.equal(torch.get_rng_state(), random)
    assert indices(own) == indices(loader())  # the order of the training did not move on
    assert flat(indices(forget.forget_loader(DataLoader(data, batch_size=4), training=True))) == gone


def test_a_forget_loader_for_training_follows_the_global_seed_where_the_loader_does(data, forget) -> None:
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, collate_fn=list_data_collate)
        orders.append(flat(indices(forget.forget_loader(loader, training=True))))
    assert orders[0] == orders[1] != orders[2]


def test_a_forget_loader_for_training_keeps_random_transforms(records, forget) -> None:
    noise = Compose([RandGaussianNoised("image", prob=1.0, std=5.0)])
    (batch,) = forget.forget_loader(DataLoader(Dataset(records, noise), batch_size=30), training=True)
    own = torch.stack([records[i]["image"] for i in batch["index"].tolist()])
    assert (batch["image"] != own).any()


@pytest.mark.parametrize(
    ("ids", "batch_size", "lengths"),
    [(["P0"], 8, [5]), (["P0", "P3"], 8, [8]), (["P0"], 4, [4]), (["P0"], 5, [5])],
)
def test_drop_last_leaves_a_batch_of_a_small_forget_set(data, ids, batch_size, lengths) -> None:
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    part = ForgetSet(ids, key="patient").forget_loader(loader, training=True)
    assert [len(batch) for batch in indices(part)] == lengths


@pytest.mark.parametrize("name", ["weighted", "replacement", "fewer", "list"])
def test_a_custom_sampler_is_refused_for_training_on_the_forget_set(data, forget, name) -> None:
    loader = DataLoader(data, batch_size=8, sampler=drawn_samplers(data)[name])
    with pytest.raises(ValueError, match=r"A forget loader can't be made from a .*Give the method a loader"):
        forget.forget_loader(loader, training=True)


def test_from_a_forget_loader_for_training_both_parts_are_found(data, forget) -> None:
    loader = DataLoader(data, batch_size=8, shuffle=True)
    part = forget.forget_loader(loader, training=True)
    assert flat(indices(forget.forget_loader(part))) == [i for i in range(30) if IS_FORGET[i]]
    assert flat(indices(forget.retain_loader(part, training=False))) == [i for i in range(30) if not IS_FORGET[i]]
    assert sorted(flat(indices(forget.retain_loader(part, training=True)))) == [
        i for i in range(30) if not IS_FORGET[i]
    ]


def test_processes_that_load_forget_samples_stay_from_one_round_to_the_next(data, forget) -> None:
    part = forget.forget_loader(DataLoader(data, batch_size=8, num_workers=1), training=True)
    assert part.persistent_workers
    first = iter(part)
    assert flat([batch["index"].tolist() for batch in first]) == [i for i in range(30) if IS_FORGET[i]]
    assert iter(part) is first


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 10), (0.01, 1), (0.99, 20)])
def test_a_part_of_the_retain_samples_comes_with_all_forget_samples(records, fraction, kept) -> None:
    forget = ForgetSet(["P0", "P3"], key="patient")
    whole = DataLoader(Dataset(records), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    part = forget.with_part_of_retain(whole, fraction, seed=1)
    positions = list(part.dataset.indices)
    assert len(positions) == len(set(positions)) == 10 + kept
    assert {i for i in range(30) if i // 5 in (0, 3)} <= set(positions)
    assert positions == list(forget.with_part_of_retain(whole, fraction, seed=1).dataset.indices)
    assert len(forget.forget_loader(part).dataset) == 10
    assert len(forget.retain_loader(part, training=True).dataset) == kept


def test_all_of_the_retain_samples_is_the_loader_itself(records) -> None:
    whole = DataLoader(Dataset(records), batch_size=8)
    assert ForgetSet(["P0"], key="patient").with_part_of_retain(whole, 1.0) is whole


@pytest.mark.parametrize("fraction", [0, -1, 1.1, True, "0.5", float("nan")])
def test_a_share_of_the_retain_samples_that_is_none_raises(records, fraction) -> None:
    with pytest.raises(ValueError, match=r"retain_fraction should lie in \(0, 1\], but got"):
        ForgetSet(["P0"], key="patient").with_part_of_retain(DataLoader(Dataset(records)), fraction)


def test_some_forget_samples_may_go_with_the_retain_samples(records) -> None:
    forget = ForgetSet(["P0", "P3"], key="patient")
    whole = DataLoader(Dataset(records), batch_size=8, shuffle=True)
    with_some = forget.retain_loader(whole, training=True, also=[16, 2])
    assert list(with_some.dataset.indices) == sorted([2, 16, *(i for i in range(30) if i // 5 not in (0, 3))])
    assert len(forget.retain_loader(with_some, training=True).dataset) == 20


def test_ids_are_those_of_the_records_in_order(records) -> None:
    numbered = [{**record, "index": torch.tensor(i)} for i, record in enumerate(records)]
    assert ForgetSet([3]).ids(Dataset(numbered)) == list(range(30))
    part = ForgetSet(["P0"], key="patient").forget_loader(DataLoader(Dataset(records))).dataset
    assert ForgetSet(["P0"], key="patient").ids(part) == ["P0"] * 5
    with pytest.raises(ValueError, match="known by a flag, 'is_forget', which does not tell one from another"):
        ForgetSet.flagged().ids(Dataset(records))
