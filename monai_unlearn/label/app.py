"""The MONAI Label app."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any

import schedule
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore

from monai_unlearn.label.private_logs import hide_in_logs
from monai_unlearn.label.routes import answers, mount, start
from monai_unlearn.label.site import read_site
from monai_unlearn.label.tasks import Classify, Membership, MostExposed, Served, TrainModel, Unlearn
from monai_unlearn.label.unlearning import BusyError, Unlearning

__all__ = ["UnlearningApp", "UnlearningTasks"]

logger = logging.getLogger("monai_unlearn")

# What a client may save as a label of an image to have its patient forgotten.
TAG = "forget"
DICOM = "*.dcm"


class UnlearningTasks:
    """What an app needs to take deletion requests; an app of a site's own adds it in three lines.

    Args:
        app: the app, of which folder, settings and datastore are used.

    Example::

        class MyApp(MONAILabelApp):
            def init_trainers(self):
                self.unlearning = UnlearningTasks(self)
                return {**my_trainers, **self.unlearning.trainers()}

            def on_init_complete(self):
                super().on_init_complete()
                self.unlearning.serve()
    """

    def __init__(self, app: MONAILabelApp) -> None:
        self.app = app
        self.unlearning = Unlearning(read_site(app.studies, app.conf))
        self.served = Served(self.unlearning)
        hide_in_logs(self.unlearning.withdrawn)

    def trainers(self) -> dict[str, Any]:
        """``unlearn``, and training of the model."""
        return {"unlearn": Unlearn(self.unlearning), self.unlearning.site.model: TrainModel(self.unlearning)}

    def infers(self) -> dict[str, Any]:
        """Classification by the served model."""
        return {self.unlearning.site.model: Classify(self.served)}

    def scoring_methods(self) -> dict[str, Any]:
        """Membership scores."""
        return {"membership": Membership(self.served)}

    def strategies(self) -> dict[str, Any]:
        """The most exposed image first."""
        return {"most_exposed": MostExposed()}

    def serve(self) -> None:
        """Open the routes of the server, import the site's model if none is served, and go on after a crash."""
        datastore = self.app.datastore()
        server = sys.modules.get("monailabel.app")
        if server is None:  # a background task, which has no routes
            return
        mount(server.app, self.unlearning, datastore)
        for request in self.unlearning.recover(datastore)[:1]:  # one run carries out all that waits
            logger.info("Request %s was interrupted, and starts again.", request.id)
            start(request.options)
        after = self.unlearning.site.finalise_after
        if after is not None:

            def finalise() -> None:
                with suppress(BusyError):
                    self.unlearning.finalise(after)

            schedule.every().hour.do(finalise)  # MONAI Label runs what is pending
            finalise()
        if self.unlearning.site.checkpoint is not None and self.unlearning.versions.current() is None:
            self.unlearning.import_model(datastore)

    def on_label(self, image: str) -> None:
        """Queue an image's patient if it has a label of the tag ``forget``."""
        labels = self.app.datastore().json()["objects"].get(image, {}).get("labels", {})
        if TAG in labels:
            with answers():
                self.unlearning.receive(self.app.datastore(), "tag", images=[image])


class UnlearningApp(MONAILabelApp):
    """An app for one classifier, whose patients can be forgotten."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        # Before the datastore, which names in the log what it misses.
        self.studies, self.conf = studies, conf or {}
        self.unlearning = UnlearningTasks(self)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="MONAI Label - unlearning",
            description="Classification by a model that can be made to unlearn patients",
        )

    def init_infers(self) -> dict[str, Any]:
        """MONAI Label asks for these in turn."""
        return self.unlearning.infers()

    def init_trainers(self) -> dict[str, Any]:
        """MONAI Label asks for these in turn."""
        return self.unlearning.trainers()

    def init_strategies(self) -> dict[str, Any]:
        """MONAI Label asks for these in turn."""
        return {**super().init_strategies(), **self.unlearning.strategies()}

    def init_scoring_methods(self) -> dict[str, Any]:
        """MONAI Label asks for these in turn."""
        return self.unlearning.scoring_methods()

    def init_datastore(self) -> Datastore:
        """DICOM files count as images too."""
        if DICOM not in settings.MONAI_LABEL_DATASTORE_FILE_EXT:
            settings.MONAI_LABEL_DATASTORE_FILE_EXT = [*settings.MONAI_LABEL_DATASTORE_FILE_EXT, DICOM]
        return super().init_datastore()

    def on_init_complete(self) -> None:
        """The server is about to take requests."""
        super().on_init_complete()
        self.unlearning.serve()

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """A client has saved a label."""
        self.unlearning.on_label(image_id)
