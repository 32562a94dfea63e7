"""Routes of the server: a request comes in, its state and report go out; they stand before MONAI Label's own."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query
from fastapi import Path as InPath
from fastapi.responses import FileResponse, HTMLResponse
from monailabel.config import settings
from monailabel.endpoints.train import status as train_status
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import processes
from pydantic import BaseModel, ConfigDict, Field

from monai_unlearn.data import DeletionRequest, read_request
from monai_unlearn.label.images import UnknownImagesError
from monai_unlearn.label.private_logs import hidden
from monai_unlearn.label.queue import QueuedRequest, UnknownRequestError
from monai_unlearn.label.unlearning import AlreadyWithdrawnError, BusyError, Options, Unlearning, read_options
from monai_unlearn.label.versions import NoModelError

__all__ = ["answers", "mount", "start"]

logger = logging.getLogger("monai_unlearn")

PAGE = Path(__file__).with_name("page.html")
TASK = "unlearn"
ADMIN, USER = settings.MONAI_LABEL_AUTH_ROLE_ADMIN, settings.MONAI_LABEL_AUTH_ROLE_USER
Id = Annotated[str, InPath(pattern=r"^r[0-9a-f]{12}$", description="id of a deletion request")]
MOST_IDS = 100_000


class Message(BaseModel):
    """What went wrong, and what to do."""

    detail: Any


class Order(BaseModel):
    """Whom to forget, and how; without anybody, the requests that wait are carried out."""

    model_config = ConfigDict(extra="allow")

    images: list[str] | str = Field(default=[], description="ids of images, in a list or separated by commas")
    patients: list[str] | str = Field(default=[], description="ids of patients, in a list or separated by commas")
    request: dict[str, Any] | str | None = Field(
        default=None, description="a deletion request as in docs/requests.md, or the id of one in the queue"
    )


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Message, "description": "no JSON"},
    401: {"model": Message, "description": "not signed in"},
    403: {"model": Message, "description": "the role is missing"},
    404: {"model": Message, "description": "there is no such image, patient or request"},
    409: {"model": Message, "description": "not in this state"},
    422: {"model": Message, "description": "malformed"},
    500: {"model": Message, "description": "queue or versions are damaged"},
    507: {"model": Message, "description": "no space left"},
}


@contextmanager
def answers() -> Iterator[None]:
    """Errors as statuses and messages."""
    try:
        yield
    except (UnknownImagesError, UnknownRequestError) as error:
        raise HTTPException(404, error.args[0]) from None
    except (AlreadyWithdrawnError, BusyError, NoModelError) as error:
        raise HTTPException(409, str(error)) from None
    except ValueError as error:
        raise HTTPException(500 if "damaged" in str(error) else 422, str(error)) from None
    except OSError as error:
        raise HTTPException(
            507, f"The server could not write ({error.strerror}). Nothing was lost: try again."
        ) from None


def start(options: dict[str, Any]) -> dict[str, Any]:
    """Start the background task that carries out what waits; behind another one that is at work.

    Nothing but the options goes along: the task's command line and log show what it is given.
    """
    known = {name: value for name, value in options.items() if name in (*Options.__dataclass_fields__, "gpus")}
    task, message = AsyncTask.run("train", request={"model": TASK}, params=known, enqueue=True)
    if task is None:
        raise HTTPException(429, message)
    return _without_request(task)


def mount(server: FastAPI, unlearning: Unlearning, datastore: Any) -> None:
    """Put the routes before MONAI Label's own.

    Args:
        server: MONAI Label's server.
        unlearning: the app's.
        datastore: the app's datastore.
    """
    router = APIRouter(tags=["Unlearning"], responses=ERRORS)
    admin, user = Depends(RBAC(ADMIN)), Depends(RBAC(USER))

    @router.post(f"/train/{TASK}", summary="Forget images or patients")
    def forget(order: Order | None = None, user: User = admin) -> dict[str, Any]:
        return carry_out(order or Order())

    @router.post("/train/", include_in_schema=False)
    def train_all(params: dict[str, dict[str, Any]] | None = None, user: User = admin) -> dict[str, Any]:
        """OHIF's one button for all trainers: it unlearns where somebody is named or waits, and trains otherwise."""
        params = params or {}
        with answers():
            order = Order(**params.get(TASK, {}))
            waits = any(one.state == "resolved" for one in unlearning.queue.requests())
        if order.images or order.patients or order.request or waits:
            return {TASK: {"result": carry_out(order), "detail": None}}
        found = {}
        for name in app_instance().info()["trainers"]:
            if name != TASK:
                task, detail = AsyncTask.run("train", request={"model": name}, params=params.get(name), enqueue=True)
                found[name] = {"result": task, "detail": detail}
        return found

    def after_an_end() -> None:
        """What a task was at that was killed has failed; no task of this server is at work then."""
        if not processes("train") and not unlearning.running():
            unlearning.stopped("The run ended before its time: it was killed, or ran out of memory. Try it again.")

    @router.get("/train/", include_in_schema=False)
    def status(all: bool = False, check_if_running: bool = False, user: User = user) -> Any:
        """As MONAI Label's, without names in the last lines of the log."""
        found = train_status(all, check_if_running)
        return [_clean(task, unlearning) for task in found] if isinstance(found, list) else _clean(found, unlearning)

    @router.put("/model/{model}", include_in_schema=False)
    @router.delete("/model/{model}", include_in_schema=False)
    def keep_model(model: str, user: User = admin) -> None:
        raise HTTPException(
            409, "The model's versions are changed by training, unlearning, rollback and finalise, and by nothing else."
        )

    def carry_out(order: Order) -> dict[str, Any]:
        options = dict(order.model_extra or {})
        with answers():
            after_an_end()
            chosen = read_options(options, unlearning.site.methods)
            anybody = bool(order.images or order.patients or isinstance(order.request, dict))
            if chosen.dry_run:
                if not anybody:
                    raise ValueError("A dry run should name images or patients.")
                found = unlearning.find(datastore, *_meant(order))
                return {"dry_run": True, "n_images": len(found), "n_patients": int(found["patient"].nunique())}
            unlearning.versions.served()
            if isinstance(order.request, str) and order.request:
                queued = unlearning.queue.get(order.request)
                if queued.state == "failed":
                    queued = unlearning.retry(queued.id, datastore, options)
                if queued.state != "resolved":
                    raise BusyError(f"Request {queued.id} is {queued.state} already.")
            elif anybody:
                queued = unlearning.receive(datastore, "train", *_meant(order), options)
            else:
                waiting = [one for one in unlearning.queue.requests() if one.state == "resolved"]
                if not waiting:
                    raise UnknownImagesError("No deletion request waits. Name images or patients.")
                queued = waiting[0]
            return {**start(options), "unlearning": queued.public()}

    @router.delete("/train/", summary="Stop the run at work")
    def stop(user: User = admin) -> Any:
        task = AsyncTask.stop("train")
        with answers():
            unlearning.stopped("Stopped. The model before is still served; try again with POST /unlearn/{id}/retry.")
        return None if task is None else _clean(_without_request(task), unlearning)

    @router.delete("/datastore/", include_in_schema=False)
    @router.delete("/datastore/image", summary="Withdraw a patient's images, to be forgotten by the next run")
    def remove_image(id: Annotated[str, Query(min_length=1)], user: User = admin) -> dict[str, Any]:
        with answers():
            return {"unlearning": unlearning.receive(datastore, "datastore", images=[id]).public()}

    @router.get("/unlearn/", summary="The queue and the versions of the model")
    def queue(user: User = user) -> dict[str, Any]:
        with answers():
            after_an_end()
            # Before the versions: a run publishes first, so that whatever is served here has its version below.
            requests = [_shown(unlearning, one) for one in unlearning.queue.requests()]
            current = unlearning.versions.current()
            return {
                "model": unlearning.site.model,
                "served": None if current is None else current.public(),
                "earlier": [version.public() for version in unlearning.versions.earlier()],
                "running": unlearning.running(),
                "requests": requests,
            }

    @router.get("/unlearn/page", summary="The page", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @router.get("/unlearn/{id}", summary="One request")
    def request(id: Id, user: User = user) -> dict[str, Any]:
        with answers():
            return _shown(unlearning, unlearning.queue.get(id))

    @router.get("/unlearn/{id}/report.{kind}", summary="Its report", response_class=FileResponse)
    def report(id: Id, kind: Literal["json", "html"], user: User = user) -> FileResponse:
        with answers():
            path = unlearning.report_folder(id) / f"report.{kind}"
            if not path.is_file():
                raise UnknownRequestError("There is no report yet: a request has one as soon as it is audited.")
        return FileResponse(path, media_type="application/json" if kind == "json" else "text/html")

    @router.post("/unlearn/{id}/retry", summary="Try a request that failed again")
    def retry(id: Id, options: dict[str, Any] | None = None, user: User = admin) -> dict[str, Any]:
        with answers():
            unlearning.versions.served()
            if read_options(options or {}, unlearning.site.methods).dry_run:
                raise ValueError("Only a new request can be a dry run.")
            queued = unlearning.retry(id, datastore, options)
            return {**start(queued.options), "unlearning": queued.public()}

    @router.delete("/unlearn/{id}", summary="Take a request back: its images return")
    def cancel(id: Id, user: User = admin) -> dict[str, Any]:
        with answers():
            return {"returned": len(unlearning.cancel(id, datastore).images)}

    @router.post("/unlearn/rollback", summary="Serve the version before again")
    def rollback(user: User = admin) -> dict[str, Any]:
        with answers():
            version, undone = unlearning.rollback()
            return {"served": version.public(), "undone": undone}

    @router.post("/unlearn/finalise", summary="Remove earlier versions; there is no way back")
    def finalise(user: User = admin) -> dict[str, int]:
        with answers():
            return {"removed": unlearning.finalise()}

    before = len(server.router.routes)
    server.include_router(router, prefix=settings.MONAI_LABEL_API_STR)
    routes = server.router.routes
    routes[:] = [*routes[before:], *routes[:before]]
    server.openapi_schema = None  # of before


def _without_request(task: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name != "request"}


def _clean(task: dict[str, Any], unlearning: Unlearning) -> dict[str, Any]:
    lines = list(task.get("details", ()))  # at once, as the task's thread goes on writing
    return {**task, "details": [hidden(line, unlearning.withdrawn) for line in lines]}


def _meant(order: Order) -> tuple[list[str], list[str], DeletionRequest | None]:
    """Images, patients and rules of an order."""
    stored = _stored(order.request) if isinstance(order.request, dict) else None
    return _ids("images", order.images), _ids("patients", order.patients), stored


def _ids(name: str, given: list[str] | str) -> list[str]:
    ids = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
    if len(ids) > MOST_IDS:
        raise ValueError(f"{name} should be at most {MOST_IDS} ids, but got {len(ids)}.")
    return [id for id in ids if id]


def _stored(content: dict[str, Any]) -> DeletionRequest:
    """A request by rules; the reader takes files."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "request.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return read_request(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(unlearning: Unlearning, request: QueuedRequest) -> dict[str, Any]:
    reports = [f"/unlearn/{request.id}/report.{kind}" for kind in ("json", "html")]
    there = (unlearning.reports / request.id / "report.json").is_file()
    return {**request.public(), "reports": reports if there else []}
