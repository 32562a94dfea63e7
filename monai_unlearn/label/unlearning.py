"""A deletion request's way: received, resolved to images, unlearned, audited, and only then served."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from monai_unlearn.bundle import Bundle, hint, unwrapped
from monai_unlearn.checkpoint import load_checkpoint
from monai_unlearn.data import DeletionRequest, resolve_request
from monai_unlearn.label.images import (
    Datastore,
    Quarantine,
    UnknownImagesError,
    image_table,
    images_of,
    link_files,
    with_split,
    write_table,
)
from monai_unlearn.label.private_logs import hidden
from monai_unlearn.label.queue import OPEN, Queue, QueuedRequest
from monai_unlearn.label.site import Site
from monai_unlearn.label.versions import NoModelError, Version, Versions
from monai_unlearn.output import write_json
from monai_unlearn.report import percent
from monai_unlearn.run import Run
from monai_unlearn.training import train_model
from monai_unlearn.workflow import unlearn

__all__ = ["AlreadyWithdrawnError", "BusyError", "Options", "RunFailedError", "Unlearning", "read_options"]

logger = logging.getLogger("monai_unlearn")

# What MONAI Label and its clients send along with a task's own options.
OF_THE_SERVER = ("model", "client_id", "user", "gpus", "bundle_path", "local_rank", "multi_gpu", "name", "description")
REPORT_FILES = ("report.json", "report.html")
LONGEST = 500
AGAIN = "The model before is still served. Try another method or budget, change `accept`, or take the request back."
PATIENCE = 60  # seconds that a run waits for another one, or for a rollback, to end


class AlreadyWithdrawnError(RuntimeError):
    """Images that an open request has withdrawn already."""


class RunFailedError(RuntimeError):
    """A run failed, for the reason that its requests have, without anybody's name."""


class BusyError(RuntimeError):
    """Another run is at work."""


@dataclass(frozen=True)
class Options:
    """What a client may choose for a run.

    Args:
        method: the method's bundle.
        budget: share of retraining's samples, above 0, where the method has a budget.
        epochs: passes over the data, where the method has them.
        ratio: share of the weights that may change, in (0, 1], where the method has a mask.
        reference: whether to train two models without the images, the yardstick of the audit; takes long.
        dry_run: only say what would be forgotten.
        device: ``cpu``, ``cuda`` or ``cuda:0``; None: a GPU where there is one.
    """

    method: str = "auto"
    budget: float = 0.3
    epochs: int = 5
    ratio: float = 0.5
    reference: bool = False
    dry_run: bool = False
    device: str | None = None


def read_options(given: Mapping[str, Any], methods: Collection[str]) -> Options:
    """Options as a client sends them, checked.

    Args:
        given: name → value; a list stands for its first element, as the clients' option panels have it.
        methods: the methods that there are, the default first.

    Raises:
        ValueError: if one is misspelt or out of its range.
    """
    fields = Options.__dataclass_fields__
    values: dict[str, Any] = {"method": next(iter(methods))}
    for name, value in given.items():
        if name in OF_THE_SERVER:
            continue
        if name not in fields:
            known = [*fields, "patients", "images", "request"]
            raise ValueError(f"There is no option {name!r}.{hint(name, known)} There are: {', '.join(known)}.")
        values[name] = value[0] if isinstance(value, list) and value else value
    if values["method"] not in methods:
        raise ValueError(f"method should be one of {', '.join(methods)}, but got {values['method']!r}.")
    for name in ("reference", "dry_run"):
        value = values.get(name, False)
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{name} should be true or false, but got {value!r}.")
        values[name] = str(value).lower() == "true"
    for name, kind, low, high in (("budget", float, 0.0, None), ("epochs", int, 0, None), ("ratio", float, 0.0, 1.0)):
        if name not in values:
            continue
        try:
            if isinstance(values[name], bool):
                raise ValueError
            number = kind(values[name])
            if number != float(values[name]) or not low < number < float("inf") or (high is not None and number > high):
                raise ValueError
        except (TypeError, ValueError):
            end = "" if high is None else f" and at most {high:g}"
            raise ValueError(f"{name} should be a number above {low:g}{end}, but got {values[name]!r}.") from None
        values[name] = number
    if not (values.get("device") is None or isinstance(values["device"], str)):
        raise ValueError(f"device should be a name like cpu or cuda:0, but got {values['device']!r}.")
    return Options(**values)


class Unlearning:
    """Everything that an app needs to take deletion requests for one model; used by the server and by its tasks.

    Args:
        site: the app's settings.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.queue = Queue(site.folder)
        self.versions = Versions(site.folder / "versions")
        self.quarantine = Quarantine(site.folder / "quarantine", site.studies)
        self.work = site.folder / "work"
        self.reports = site.folder / "reports"
        # What no log may show; grows while the process lives.
        self.withdrawn = self.quarantine.names()
        self._receiving = threading.Lock()

    # What the server does.

    def receive(
        self,
        datastore: Datastore,
        source: str,
        images: Collection[str] = (),
        patients: Collection[str] = (),
        request: DeletionRequest | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> QueuedRequest:
        """Take a request in: find all images of its patients, and withdraw them from the datastore.

        Args:
            datastore: the app's datastore.
            source: how it came.
            images: ids of images.
            patients: ids of patients.
            request: a request by rules, or None.
            options: settings of the run that it asks for.

        Raises:
            UnknownImagesError: if an id is not there, or nothing is meant.
            AlreadyWithdrawnError: if an open request has them already.
        """
        with self._receiving:
            found = self.find(datastore, images, patients, request)
            self.withdrawn |= {*found["patient"], *found["image"], *found["file"]}
            queued = self.queue.add(
                source,
                patients=sorted(found["patient"].unique()),
                images=sorted(found["image"]),
                options=dict(options or {}),
            )
            try:
                self._withdraw(queued, found, datastore)
            except BaseException:
                with self.queue.change(queued.id) as queued:
                    queued.go("failed", "Its images could not be withdrawn. Try it again, or take it back.")
                raise
            with self.queue.change(queued.id) as queued:
                queued.go("resolved", _withdrawn(found))
            return queued

    def _withdraw(self, request: QueuedRequest, table: pd.DataFrame, datastore: Datastore) -> None:
        """Move what of a request's images is still in the datastore, and see that all of them are withdrawn."""
        self.quarantine.take(request.id, table[table["image"].isin(request.images)], datastore)
        if not self.quarantine.holds(request.id, request.images):
            raise ValueError("Images of the request are missing, in the datastore and in quarantine. Take it back.")

    def find(
        self,
        datastore: Datastore,
        images: Collection[str] = (),
        patients: Collection[str] = (),
        request: DeletionRequest | None = None,
    ) -> pd.DataFrame:
        """The images that a request means, as rows of ``image_table``; nothing is changed.

        Raises:
            UnknownImagesError: if an id is not there, or nothing is meant.
            AlreadyWithdrawnError: if an open request has them already.
        """
        table = image_table(datastore, self.site)
        if request is not None:
            rows = resolve_request(request, _index(table)).positions
            patients = [*patients, *table["patient"].iloc[rows]]
        if not images and not patients:
            raise UnknownImagesError("A deletion request should name images or patients, but this one means nobody.")
        self._refuse_withdrawn({*images, *patients})
        return images_of(table, images, patients)

    def _refuse_withdrawn(self, names: set[str]) -> None:
        for one in self.queue.requests():
            if one.state in (*OPEN, "failed") and not one.hashed and names & {*one.patients, *one.images}:
                raise AlreadyWithdrawnError(
                    f"Request {one.id} has withdrawn these already; it is {one.state}. "
                    + (f"Try it again: POST /unlearn/{one.id}/retry." if one.state == "failed" else "Follow it there.")
                )

    def retry(self, id: str, datastore: Datastore, options: Mapping[str, Any] | None = None) -> QueuedRequest:
        """Put a request that failed back into the queue.

        Args:
            id: the request's.
            datastore: the app's.
            options: what is to be other than at the first time.

        Raises:
            UnknownRequestError: if there is none of this id.
            ValueError: if it has not failed, or its images are gone.
        """
        request = self.queue.get(id)
        if request.state != "failed":
            raise ValueError(f"Only a request that failed can be tried again, but this one is {request.state}.")
        if request.hashed:
            raise ValueError(
                "Its images were erased when it was served, so it can't be tried again after a rollback. Train the "
                "model anew: the datastore no longer has them."
            )
        with self._receiving:
            self._withdraw(request, image_table(datastore, self.site), datastore)
        with self.queue.change(id) as request:
            request.options.update(options or {})
            request.go("resolved", "To be tried again.")
        return request

    def cancel(self, id: str, datastore: Datastore) -> QueuedRequest:
        """Take a request back that was not carried out: its images return to the datastore.

        Raises:
            UnknownRequestError: if there is none of this id.
            ValueError: if it is being carried out, or was, or its images can't return.
        """
        with self.queue.change(id) as request:
            if request.state not in ("resolved", "failed") or request.hashed:
                raise ValueError(f"A request that is {request.state} can't be taken back.")
            if request.state == "resolved":  # from now on no run takes it up
                request.go("failed", "Being taken back.")
        with self._receiving:
            self.quarantine.give_back(id, datastore)
        self.queue.remove(id)
        return request

    def stopped(self, message: str) -> None:
        """Note that the run was ended from outside: what it was at has failed, and can be tried again."""
        current = self.versions.current()
        for one in self.queue.requests():
            if current is not None and one.id in current.requests:
                self._finish(one, current)
            elif one.state in ("unlearning", "audited"):
                with self.queue.change(one.id) as request:
                    request.go("failed", message)

    def recover(self, datastore: Datastore) -> list[QueuedRequest]:
        """After a restart: finish what was being served or withdrawn, and put back what was at work.

        Returns:
            What is to be carried out now.
        """
        if self.running():
            return []
        current = self.versions.current()
        for one in self.queue.requests():
            if current is not None and one.id in current.requests:
                self._finish(one, current)
            elif one.state == "served" and not one.hashed:
                self._serve(one.id)
            elif one.state in ("unlearning", "audited"):
                with self.queue.change(one.id) as request:
                    request.go("resolved", "The run was interrupted, and starts again.")
            elif one.state == "received":
                with self.queue.change(one.id) as request:
                    request.go("failed", "The server ended before its images were withdrawn. Try it again.")
        if current is not None:
            self._hold_against(current)
        return [one for one in self.queue.requests() if one.state == "resolved" and one.source == "train"]

    def _finish(self, request: QueuedRequest, current: Version) -> None:
        """Serve what was published for a request, unless that is done."""
        if request.state != "served" or not request.hashed:
            self._serve(request.id, current)

    def _hold_against(self, current: Version) -> None:
        """Say of each request that was served whether the model that is served now was trained on its images."""
        trained = {image for image, part in self.versions.trained_on(current).items() if part == "train"}
        for one in self.queue.requests():
            if one.hashed and one.state == "served" and trained & set(one.images):
                with self.queue.change(one.id) as request:
                    request.go(
                        "failed",
                        "Rolled back: the model that is served now was trained on these images. They are erased, so "
                        "only training it anew leaves them out.",
                    )
            elif one.hashed and one.state == "failed" and not trained & set(one.images):
                with self.queue.change(one.id) as request:
                    request.version = current.name
                    request.go("served", "The model that is served now was trained without these images.")

    def rollback(self) -> tuple[Version, list[str]]:
        """Serve the version before again.

        Returns:
            That version, and the ids of the requests that are undone by it.

        Raises:
            NoModelError: if there is none.
            ValueError: if it is damaged.
            BusyError: if a run is at work.
        """
        with self._alone():
            before = {one.id for one in self.queue.requests() if one.state == "served"}
            version = self.versions.rollback()
            self._hold_against(version)
            return version, [one.id for one in self.queue.requests() if one.id in before and one.state != "served"]

    def finalise(self, older_than: timedelta = timedelta(0)) -> int:
        """Remove earlier versions, which were trained on what is forgotten; returns how many.

        Raises:
            BusyError: if a run is at work.
        """
        with self._alone():
            return self.versions.finalise(older_than)

    def running(self) -> bool:
        """Whether a run is at work in any process."""
        try:
            with self._alone():
                return False
        except BusyError:
            return True

    @contextmanager
    def _alone(self, patience: float = 0.2) -> Iterator[None]:
        try:
            with FileLock(str(self.site.folder / "run.lock"), timeout=patience):
                yield
        except Timeout:
            raise BusyError("A training or unlearning run is at work. Wait for it (GET /train/), or stop it.") from None

    # What its tasks do.

    def import_model(self, datastore: Datastore) -> Version:
        """Serve the checkpoint that the site names, as trained on all training images of the datastore.

        Raises:
            ValueError: if none is named, or it is damaged or does not fit.
        """
        if self.site.checkpoint is None:
            raise ValueError("The site names no checkpoint to import.")
        waiting = self.quarantine.table(one.id for one in self.queue.requests() if not one.hashed)
        table = with_split(_joined(image_table(datastore, self.site), waiting))
        with self._alone(PATIENCE), self._scratch() as folder:
            bundle = self._bundle("train", folder, table, {})
            data = Run.start(bundle).data
            load_checkpoint(self.site.checkpoint).load_into(bundle.build("network"))
        return self.versions.publish(self.site.checkpoint, "imported", self._hashed(table), **_about(data))

    def train(self, datastore: Datastore, settings: Mapping[str, Any]) -> Version:
        """Train a model on all labelled training images of the datastore by the site's recipe, and serve it.

        Args:
            datastore: the app's datastore.
            settings: of the recipe: ``train_epochs``, ``device``.

        Raises:
            BusyError: if a run is at work.
        """
        with self._alone(PATIENCE), self._scratch() as folder:
            with self.quarantine.moving():
                datastore.refresh()
                table = with_split(image_table(datastore, self.site))
                bundle = self._bundle("train", folder, table, settings)
            run = Run.start(bundle)
            seed = run.settings["seed"]
            model = train_model(bundle, run.model_folder(seed, forget=False), seed, None, "original", "training")
            version = self.versions.publish(model.path, "trained", self._hashed(table), **_about(run.data))
            self._hold_against(version)
            return version

    def run(self, datastore: Datastore, options: Options) -> list[QueuedRequest]:
        """Carry out all requests that wait, in one unlearning; returns them as they are afterwards.

        Raises:
            BusyError: if a run is at work.
            NoModelError: if no model is served.
        """
        with self._alone(PATIENCE):
            version = self.versions.served()
            waiting = self.queue.claim()
            if not waiting:
                logger.info("No deletion request waits.")
                return []
            try:
                self._carry_out(waiting, version, datastore, options)
            except Exception as error:
                message = self._message(error)
                self._fail(waiting, message)
                raise RunFailedError(message) from None
            if self.site.finalise_after is not None:
                self.versions.finalise(self.site.finalise_after)
            return [self.queue.get(id) for id in waiting]

    def _carry_out(self, waiting: list[str], version: Version, datastore: Datastore, options: Options) -> None:
        self.versions.load(version)
        for id in waiting:
            if not self.quarantine.holds(id, self.queue.get(id).images):
                raise ValueError(f"Images of request {id} are missing in quarantine. Try it again, or take it back.")
        parts = self.versions.trained_on(version)
        with self._scratch() as folder:
            with self.quarantine.moving():
                datastore.refresh()
                kept = self._of_the_model(image_table(datastore, self.site), parts)
                gone = self._of_the_model(self.quarantine.table(waiting), parts)
                gone = gone[gone["split"] == "train"]
                nobody = gone.empty
                settings = {} if nobody else self._settings(folder, version, gone, options)
                table = pd.concat([kept, gone], ignore_index=True)
                bundle = None if nobody else self._bundle(options.method, folder, table, settings)
            if bundle is None:
                for id in waiting:
                    message = "The model was not trained on any of these images: nothing was to be unlearned."
                    self._serve(id, version, message)
            else:
                self._unlearn(waiting, folder, version, gone, parts, bundle)

    def _settings(self, folder: Path, version: Version, gone: pd.DataFrame, options: Options) -> dict[str, Any]:
        """Settings of the unlearning's bundle, and the request that it reads."""
        request = folder / "request.json"
        write_json({"include": [{"patient": sorted(gone["patient"].unique())}]}, request)
        return {
            "original_checkpoint": str(version.path),
            "forget_request": str(request),
            "output_dir": str(folder / "run"),
            "reference": options.reference,
            "class_names": list(version.class_names),
            **self._method_settings(options),
        }

    def _unlearn(
        self,
        waiting: list[str],
        folder: Path,
        version: Version,
        gone: pd.DataFrame,
        parts: Mapping[str, str],
        bundle: Bundle,
    ) -> None:
        unlearn(bundle)
        report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
        for id in waiting:
            self._keep_report(id, folder / "run")
            with self.queue.change(id) as one:
                one.go("audited", _figures(report))
                one.notes = [*report["notes"], *self._not_judged(report)]
        refused = self._refusal(report)
        if refused is not None:
            self._fail(waiting, refused)
            logger.info("Not served: %s", refused)
            return
        forgotten = {self.queue.hash(image) for image in gone["image"]}
        published = self.versions.publish(
            folder / "run" / "unlearned_model.pt",
            "unlearned",
            {image: part for image, part in parts.items() if image not in forgotten},
            class_names=version.class_names,
            channels=version.channels,
            multi_label=version.multi_label,
            requests=waiting,
        )
        for id in waiting:
            self._serve(id, published)
        logger.info("Served: version %s.", published.name)

    def _serve(self, id: str, version: Version | None = None, message: str | None = None) -> None:
        """The last steps of a request, each of which may be repeated after a crash."""
        with self.queue.change(id) as request:
            if request.state != "served":
                request.version = None if version is None else version.name
                request.go("served", request.message if message is None else message)
        self.quarantine.erase(id)
        self.queue.forget_names(id)

    def _fail(self, waiting: Collection[str], message: str) -> None:
        current = self.versions.current()
        for one in self.queue.requests():
            if one.id in waiting and current is not None and one.id in current.requests:
                self._finish(one, current)
            elif one.id in waiting and one.state in ("unlearning", "audited"):
                with self.queue.change(one.id) as request:
                    request.go("failed", message)

    def _message(self, error: BaseException) -> str:
        """What went wrong, without anybody's name."""
        error = unwrapped(error)
        text = hidden(" ".join(str(error).split()), self.withdrawn)
        plain = isinstance(error, (ValueError, OSError, FloatingPointError, NoModelError)) and text
        return (text if plain else f"{type(error).__name__}: {text}")[:LONGEST]

    def _refusal(self, report: Mapping[str, Any]) -> str | None:
        """Why a model is not to be served, or None."""
        accept, models, figure = self.site.accept, report["models"], _figure(report)
        before, after = (models[name]["test"][figure] for name in ("original", "unlearned"))
        if before is not None and after is not None and before - after > accept.test_loss:
            return (
                f"Not accepted: test {figure} fell from {percent(before)} to {percent(after)} %, by more than the "
                f"{percent(accept.test_loss)} points that `accept` allows. {AGAIN}"
            )
        attack = models["unlearned"]["attack"]
        if attack["low"] is not None and attack["high"] is not None:
            # Images that fit worse than unseen ones give themselves away just as well.
            apart = max(attack["low"], 1 - attack["high"])
            if apart > accept.attack_auc:
                return (
                    f"Not accepted: forgotten images can be told from unseen ones with an AUC of at least {apart:.3f}, "
                    f"above the {accept.attack_auc:g} of `accept`. {AGAIN}"
                )
        answer = report["audit"]["verdict"]["answer"] if report["audit"] else None
        if accept.verdicts and answer not in accept.verdicts:
            return f"Not accepted: the audit's verdict is {answer}. {AGAIN}"
        return None

    def _not_judged(self, report: Mapping[str, Any]) -> list[str]:
        """What `accept` asks for and the report has no figure for: said, and not held against the model."""
        accept, unlearned, figure = self.site.accept, report["models"]["unlearned"], _figure(report)
        notes = []
        if unlearned["test"][figure] is None:
            notes.append(f"`test_loss` of `accept` was not judged: there is no test {figure} of so few images.")
        if accept.attack_auc < 1 and unlearned["attack"]["low"] is None:
            notes.append(
                "`attack_auc` of `accept` was not judged: the attack has no interval for so few patients. Carry out "
                "several requests at once where that matters."
            )
        return notes

    def _keep_report(self, id: str, run: Path) -> None:
        folder = self.report_folder(id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter(lambda name: (run / name).is_file(), REPORT_FILES):
            part = folder / f".{name}.part"
            shutil.copyfile(run / name, part)
            os.replace(part, folder / name)

    def report_folder(self, id: str) -> Path:
        """Where a request's reports lie."""
        return self.reports / self.queue.get(id).id

    def bundle(self, version: Version) -> Bundle:
        """The bundle of the model that is served, for its network and its transforms; no data is read."""
        bundle = Bundle.from_files(self.site.configs("train"), **dict(self.site.options))
        bundle.share(data=_DataOf(version))
        return bundle

    def _bundle(self, config: str, folder: Path, table: pd.DataFrame, settings: Mapping[str, Any]) -> Bundle:
        """A bundle on a table of images, of which the run gets links of its own."""
        if "label" in table:  # images that nobody has labelled yet
            table = table[table["label"].notna()]
        table = link_files(table, self.site.studies, folder / "images")
        write_table(table, folder / "images.csv")
        names = self.site.class_names
        given = {
            "dataset_dir": str(folder / "images"),
            "labels_file": str(folder / "images.csv"),
            "models_dir": str(folder / "models"),
            "class_names": None if names is None else list(names),
            **self.site.options,
            **{name: value for name, value in settings.items() if value is not None},
            "data": {
                "_target_": "monai_unlearn.data.read_table",
                "dataset_dir": "@dataset_dir",
                "labels_file": "@labels_file",
                "class_names": "@class_names",
                "on_broken": "@on_broken",
            },
        }
        return Bundle.from_files(self.site.configs(config), **given)

    def _method_settings(self, options: Options) -> dict[str, Any]:
        """The options that a method has."""
        config = json.loads(Path(self.site.configs(options.method)[0]).read_text(encoding="utf-8"))
        named = {"budget": options.budget, "epochs": options.epochs, "saliency_ratio": options.ratio}
        return {
            **{name: value for name, value in named.items() if name in config},
            **({"device": options.device} if options.device else {}),
        }

    def _of_the_model(self, table: pd.DataFrame, parts: Mapping[str, str]) -> pd.DataFrame:
        """The images that a model was trained or tested on, each in its part; later ones are left out."""
        if table.empty:
            return table.assign(image=[], patient=[], split=[])
        part = table["image"].map(lambda image: parts.get(self.queue.hash(image)))
        return table.assign(split=part)[part.notna()].reset_index(drop=True)

    def _hashed(self, table: pd.DataFrame) -> dict[str, str]:
        return {self.queue.hash(image): part for image, part in zip(table["image"], table["split"])}

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for what only the run needs: it holds names and functions of the images, and goes in any case."""
        shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed
        self.work.mkdir(parents=True, mode=0o700)
        try:
            yield self.work
        finally:
            shutil.rmtree(self.work, ignore_errors=True)


class _DataOf:
    """What a network's definition asks of the data."""

    def __init__(self, version: Version) -> None:
        self.channels = version.channels
        self.num_classes = len(version.class_names)
        self.class_names = version.class_names
        self.multi_label = version.multi_label


def _about(data: Any) -> dict[str, Any]:
    return {"class_names": data.class_names, "channels": data.channels, "multi_label": data.multi_label}


def _withdrawn(found: pd.DataFrame) -> str:
    """What the request's state says beside its numbers."""
    alone = int((found["patient"] == found["image"]).sum())
    note = f" {alone} of them name no patient, so nobody else's image goes with them." if alone else ""
    return f"Withdrawn from the datastore.{note}"


def _joined(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    return one if other.empty else pd.concat([one, other], ignore_index=True)


def _index(table: pd.DataFrame) -> pd.DataFrame:
    """The table as requests by rules see it: numbers as numbers."""
    numbers = {
        name: pd.to_numeric(table[name], errors="coerce") for name in table if name not in ("image", "file", "patient")
    }
    whole = {name: values for name, values in numbers.items() if values.notna().equals(table[name].notna())}
    return table.drop(columns="image").assign(**whole)


def _figure(report: Mapping[str, Any]) -> str:
    """What a report's task is judged by."""
    return "auroc" if report["task"] == "multi-label" else "accuracy"


def _figures(report: Mapping[str, Any]) -> str:
    """The figures of a report in one line."""
    figure = _figure(report)
    before, after = (report["models"][name] for name in ("original", "unlearned"))
    parts = [
        f"{split} {figure} {percent(before[split][figure])} → {percent(after[split][figure])} %"
        for split in ("forget", "retain", "test")
    ]
    low, high = (after["attack"][end] for end in ("low", "high"))
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    auc = after["attack"]["auc"]
    attack = "" if auc is None else f"; attack AUC {auc:.2f}{interval}"
    return ", ".join(parts) + attack + "."
