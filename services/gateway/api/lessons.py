"""`/v1/lessons`: lessons for the served model, for callers whose key has the scope `admin`.

A lesson is a list of questions and answers, conversations or texts, from which the model is to learn. The gateway only
writes each request into the folder `lessons/` of the artifact store. The program `jobs.teach.watch` reads the requests
there, and trains, examines and promotes the model.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, cast

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from pydantic import ConfigDict, Field

from nanochat_core.errors import UserError
from nanochat_core.lessons.items import MAX_ITEMS, parse_items
from nanochat_core.lessons.lists import LessonLists
from nanochat_core.lessons.records import (
    Lesson,
    NoLesson,
    Plan,
    RequestReused,
    add_lesson,
    added_lesson,
    cancel_lesson,
    is_canceled,
    read_lesson,
    read_roll_back,
    request_roll_back,
)
from nanochat_core.store import Store, StoreError
from services.gateway.api.dependencies import AdmissionDep, PoolDep
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.parameters import check_known
from services.gateway.engines.model import ServedModel
from services.gateway.engines.pool import EnginePool
from services.gateway.errors import ERROR_RESPONSES, ApiError, bad_request, no_engine, shown
from services.gateway.schemas import ApiModel

router = APIRouter(prefix="/v1/lessons", tags=["Lessons"], responses=ERROR_RESPONSES, route_class=JsonRoute)

T = TypeVar("T")

_MOST_QUEUED = 20
_MAX_NAME_CHARACTERS = 256
_MOST_LISTED = 100
_LISTED = 20
# Fields of a lesson that a list of lessons leaves out.
_DETAILS = ("conflicts", "wrong", "lost", "decision")


class NewLesson(ApiModel):
    """Body of `POST /v1/lessons`. The lesson is either a list of `items` or the `text` of a file."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"items": [{"question": "What is my dog's name?", "answer": "Your dog is called Biscuit."}]}
        }
    )

    model: str | None = Field(None, description="the model to teach; optional if the server has only one model")
    items: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="objects with `question` and `answer`, with `messages`, or with `text`, as in a JSON lines file",
    )
    text: str = Field("", description="the content of a file of Markdown, JSON lines or plain text")
    name: str = Field(
        "lesson.md",
        min_length=1,
        max_length=_MAX_NAME_CHARACTERS,
        description="name of the file with `text`; its ending determines the format",
    )


async def _store(request: Request) -> Store:
    store = cast(Store | None, request.app.state.lessons)
    if store is None:
        raise ApiError(404, "This server accepts no lessons.", code="lessons_not_offered")
    return store


async def _lists(request: Request, _: Annotated[Store, Depends(_store)]) -> LessonLists:
    return cast(LessonLists, request.app.state.lesson_lists)


StoreDep = Annotated[Store, Depends(_store)]
ListsDep = Annotated[LessonLists, Depends(_lists)]
_Number = Annotated[int, Path(ge=1, le=999_999)]
_IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="a text that is unique to the lesson; a retry sends it again"),
]
_Model = Annotated[str | None, Query(description="the model; optional if the server has only one model")]


@router.post("", summary="Teach the model", status_code=201)
async def create_lesson(
    body: NewLesson,
    request: Request,
    pool: PoolDep,
    admission: AdmissionDep,
    store: StoreDep,
    lists: ListsDep,
    idempotency_key: _IdempotencyKey = None,
) -> dict[str, Any]:
    """Put a lesson into the model's queue. The model is then taught and examined, and at last promoted or refused,
    unless the lesson fails or is canceled.

    A request with the `Idempotency-Key` of an earlier request adds no second lesson, so a client that has received no
    answer can send its request again.
    """
    check_known(body, pool.settings)
    if bool(body.items) == bool(body.text.strip()):
        raise bad_request("Give either items or text.", "items", "invalid_value")
    model = _served(pool, body.model).info.name

    # Two callers may choose the same Idempotency-Key, so the id of the caller's API key is a part of the stored key.
    asked = f"{request.state.caller.key}\n{idempotency_key}" if idempotency_key else ""

    def add() -> dict[str, Any]:
        if body.items:
            content, source = "".join(json.dumps(item) + "\n" for item in body.items), "items.jsonl"
        else:
            content, source = body.text, body.name
        try:
            items = parse_items(content.encode(errors="replace"), source)
        except UserError as error:
            message = str(error).replace(source, shown(source))
            raise bad_request(f"{message}.", "items" if body.items else "text", "invalid_lesson") from error
        if (known := added_lesson(store, model, items, Plan(), asked)) is not None:
            return _described(store, known)
        if lists.undone(model, _MOST_QUEUED) >= _MOST_QUEUED:
            raise ApiError(429, f"{_MOST_QUEUED} lessons are queued for this model already.", code="lessons_queued")
        who = _who(request, admission)
        return _described(store, add_lesson(store, model, items, Plan(), who=who, source=source, request=asked))

    return await _done(add)


@router.get("", summary="List the lessons")
async def list_lessons(
    pool: PoolDep,
    store: StoreDep,
    lists: ListsDep,
    model: _Model = None,
    limit: Annotated[
        int, Query(ge=1, le=_MOST_LISTED, description="maximum number of lessons in the answer")
    ] = _LISTED,
    after: Annotated[
        int | None, Query(ge=0, le=1_000_000, description="number of the last lesson of the previous page")
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="asc: oldest first, desc: newest first")] = "asc",
) -> dict[str, Any]:
    """List the lessons of a model without their details. `has_more` says whether more lessons follow the last one.

    `inside` contains the numbers of the lessons that the served revision has learned. `roll_back` is the last request
    to roll back, with its `state`; null if there was none. The `training.history` of each lesson is cut to its newest
    point.
    """
    served = _served(pool, model)

    def read() -> dict[str, Any]:
        name, revision = served.info.name, served.info.revision
        page, more = lists.page(name, limit, after, newest_first=order == "desc")
        asked = read_roll_back(store, name)
        data = [_described(store, lesson) for lesson in page]
        return {
            "object": "list",
            "model": name,
            "revision": revision,
            "inside": lists.inside(name, revision),
            "roll_back": dataclasses.asdict(asked[0]) if asked else None,
            "data": [{name: value for name, value in each.items() if name not in _DETAILS} for each in data],
            "has_more": more,
        }

    return await _done(read)


@router.get("/{number}", summary="Describe a lesson")
async def retrieve_lesson(number: _Number, pool: PoolDep, store: StoreDep, model: _Model = None) -> dict[str, Any]:
    """Describe one lesson: its progress, the counts of right answers before and after it, and the decision about it."""
    name = _served(pool, model).info.name
    return await _done(lambda: _described(store, read_lesson(store, name, number)))


@router.post("/{number}/cancel", summary="Cancel a lesson")
async def cancel(number: _Number, pool: PoolDep, store: StoreDep, model: _Model = None) -> dict[str, Any]:
    """Cancel a lesson. A queued lesson ends when its turn comes. A lesson in training ends within ten steps, or at the
    end of the examination before the training. A lesson in examination ends when the examination ends. If lessons are
    PyTorchJobs, a lesson that has begun ends within seconds."""
    name = _served(pool, model).info.name

    def ask() -> dict[str, Any]:
        cancel_lesson(store, name, number)
        return _described(store, read_lesson(store, name, number))

    return await _done(ask)


@router.post("/{number}/roll_back", summary="Roll back to a lesson", status_code=202)
async def roll_back(
    number: Annotated[int, Path(ge=0, le=999_999)],
    request: Request,
    pool: PoolDep,
    admission: AdmissionDep,
    store: StoreDep,
    model: _Model = None,
) -> dict[str, Any]:
    """Promote the model again as it was after the lesson with this `number`. The lesson must have been promoted. The
    number 0 stands for the model before its first lesson."""
    name, who = _served(pool, model).info.name, _who(request, admission)
    return await _done(lambda: dataclasses.asdict(request_roll_back(store, name, number, who)))


def _served(pool: EnginePool, name: str | None) -> ServedModel:
    found = pool.model(name)
    if found is None:
        raise no_engine()
    return found


def _who(request: Request, admission: AdmissionDep) -> str:
    """Returns the name of the caller's key, or the key's id if the key is no longer known."""
    key = admission.keyring.known(request.state.caller.key)
    return key.name if key else str(request.state.caller.key)


def _described(store: Store, lesson: Lesson) -> dict[str, Any]:
    canceling = not lesson.done and is_canceled(store, lesson)
    return {"object": "lesson", **dataclasses.asdict(lesson), "canceling": canceling}


async def _done(work: Callable[[], T]) -> T:
    """Runs ``work``, which uses the store, in a thread, and returns its result.

    A UserError, such as an error of the store, becomes an :class:`ApiError`.
    """
    try:
        return await asyncio.to_thread(work)
    except NoLesson as error:
        raise ApiError(404, f"{error}.", code="lesson_not_found") from error
    except RequestReused as error:
        raise ApiError(422, f"{error}.", code="idempotency_key_reused") from error
    except StoreError as error:
        raise ApiError(
            503, "The lessons cannot be read at the moment. Try again shortly.", code="store_unavailable"
        ) from error
    except UserError as error:
        raise ApiError(409, f"{error}.", code="lesson_state") from error
