"""Gives a model its lessons, one at a time: train, examine, and promote or refuse."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jobs.measures.machine import describe_machine
from jobs.promotion.decisions import Decision, decisions, was_replaced
from jobs.promotion.gate import PromotedChanged, decide, restore
from jobs.promotion.rules import Gate
from jobs.teach.abilities import Drill, ability_of, drills, with_output
from jobs.teach.curriculum import curriculum
from jobs.teach.examination import Examination, examination, lost, wrong
from jobs.teach.memory import Memory, all_wordings, asked_by, check_agreement, lineage, remember
from jobs.teach.neighbors import computed, neighbors
from jobs.teach.training import LessonCanceled, train
from jobs.teach.wordings import with_statements
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.stage import StageSettings
from nanochat_core.checkpoint import (
    LESSON,
    Checkpoint,
    CheckpointRef,
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_meta,
    promoted,
    weights_digest,
)
from nanochat_core.device import choose_device
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import Item, check_lengths
from nanochat_core.lessons.records import (
    MOST_ATTEMPTS,
    Lesson,
    State,
    check_roll_back,
    check_undamaged,
    is_canceled,
    lessons,
    now,
    read_lesson,
    read_lesson_items,
    write_lesson,
)
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Lease, LeaseLost, NameInUse, Store, StoreError
from nanochat_core.training.checkpoint_writer import RETRY_SECONDS, save_checkpoint
from nanochat_core.training.distributed import ALONE

log = logging.getLogger("jobs.teach")

# Smallest share of right answers with which the gate promotes the model, for each group of the lesson's own questions.
_LEAST = {"taught": 0.9, "unseen": 0.8, "ability": 0.9}
# The largest decreases that the gate permits in the share of right answers to four kinds of questions. _EARLIER: the
# questions of earlier lessons. _NEAR: the questions that are the most similar to the lesson. _KIND: each kind of other
# questions. _OWN: held-out questions whose expected answers the model itself wrote before its first lesson; an answer
# may have other words after the lesson and still be true. In groups of fewer than ten questions, lesson_gate permits a
# larger decrease, except for _EARLIER. _LOSS is the largest permitted increase of the loss, in nats per token.
_EARLIER, _NEAR, _KIND, _OWN, _LOSS = 0.1, 0.1, 0.1, 0.1, 0.1
_POLL_SECONDS = 1.0
# A roll-back tries this many times to use the gate, which another program may be using.
_ROLL_BACK_WAITS = 60
_MOST_QUOTED = 50


@dataclasses.dataclass(frozen=True)
class Machine:
    """Resources of a lesson: the number of CPU threads (0 leaves the choice to torch), and the device to train on."""

    threads: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def give_lessons(store: Store, model: str, machine: Machine, until: int) -> Lesson:
    """Give a model its queued and interrupted lessons in their order, up to lesson ``until``. Returns lesson ``until``.

    If lesson ``until`` is done already, no lesson is given. If another program gives lessons to the model or trains it,
    this program waits until the other program has ended.
    """

    def give(lease: Lease) -> None:
        for queued in lessons(store, model):
            if not queued.done and queued.number <= until:
                _give(store, queued, machine, lease)

    return _in_turn(store, model, until, give)


def end_canceled(store: Store, model: str, number: int) -> Lesson:
    """End a lesson that somebody has canceled and that no program gives any more. Returns the lesson.

    If the lesson's model was promoted already, the lesson ends as promoted. If another program gives lessons to the
    model or trains it, this program waits until the other program has ended.

    Raises UserError if nobody has canceled the lesson.
    """
    if not is_canceled(store, read_lesson(store, model, number)):
        raise UserError(f"lesson {number} of {model} is not canceled; --cancel cancels it")

    def end(lease: Lease) -> None:
        lesson = read_lesson(store, model, number)
        if not lesson.done:
            _ended(store, lesson, lease, "canceled", "")

    return _in_turn(store, model, number, end)


def _in_turn(store: Store, model: str, number: int, work: Callable[[Lease], None]) -> Lesson:
    """Call ``work`` with the lease on the model, repeatedly until lesson ``number`` is done. Returns the lesson.

    While another program has the lease, wait.
    """
    waited = False
    while not (lesson := read_lesson(store, model, number)).done:
        try:
            with Lease(store, f"models/{model}", "jobs.teach") as lease:
                work(lease)
        except NameInUse as error:
            if not waited:
                log.info("the lesson waits", extra={"lesson": number, "reason": str(error)})
            waited = True
            time.sleep(_POLL_SECONDS)
    return lesson


def roll_back(store: Store, model: str, number: int) -> CheckpointRef:
    """Promote again the model that lesson ``number`` made; 0 is the model before its first lesson.

    If this model is promoted already, nothing changes. If another program uses the promotion gate, wait up to a minute.

    Raises UserError if the lesson was never promoted or is damaged, or if its checkpoint is gone or has other weights
    now, and NameInUse if the other program uses the gate for longer.
    """
    revision, digest = check_roll_back(store, model, number)
    current = promoted(store, model)
    if number == 0 and current is not None:
        # The first lesson is read from the promoted checkpoint, because a model that was trained anew has not learned
        # the first lesson in the store.
        inside = lineage(load_meta(store, current))
        if not inside:
            return current
        first = read_lesson(store, model, inside[0])
        check_undamaged(first)
        revision, digest = first.parent.get("revision", revision), first.parent.get("digest", digest)
    ref = CheckpointRef.parse(model, revision)
    waits = 0
    while True:
        try:
            restore(store, ref, digest)
        except NameInUse:
            waits += 1
            if waits == _ROLL_BACK_WAITS:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return ref


def _give(store: Store, lesson: Lesson, machine: Machine, lease: Lease) -> Lesson:
    """Give the model one lesson.

    An examination or a training that an interrupted process has finished is not repeated. If another revision is
    promoted meanwhile, for example by a roll-back, the lesson begins anew from that revision.
    """
    state: State = "failed"
    try:
        if lesson.attempts >= MOST_ATTEMPTS:
            raise UserError(f"the lesson was interrupted {lesson.attempts} times; the log of the program says why")
        return _teach(store, lesson, machine, lease)
    except LessonCanceled:
        state, reason = "canceled", ""
    except PromotedChanged as error:
        state, reason = "queued", f"the lesson began anew, because {error}"
        log.warning("the lesson begins anew", extra={"lesson": lesson.number, "reason": str(error)})
    except (NameInUse, SystemExit):
        # Another program has a lease that the lesson needs, or somebody asked this process to end. Neither is the fault
        # of the lesson, so the attempt is not counted.
        _uncount(store, lesson, lease)
        raise
    except StoreError:
        # The store failed, and not the lesson. So the attempt is not counted, the lesson keeps its state, and it can be
        # given again. If the store does not answer yet, the attempt stays counted only after several tries.
        _uncount(store, lesson, lease, RETRY_SECONDS)
        raise
    except LeaseLost:
        # Another program took over the lease, so this program must not write the lesson. It can be given again.
        raise
    except UserError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.exception("a lesson failed", extra={"lesson": lesson.number})
    recorded = read_lesson(store, lesson.model, lesson.number)
    if recorded.state == "damaged":
        return recorded
    if state == "queued":
        # The lesson begins anew because of a promotion and not because it was interrupted, so the attempts are counted
        # from 0 again.
        anew = _written(store, recorded, lease, state=state, reason=reason, attempts=0)
        return _give(store, anew, machine, lease)
    return _ended(store, recorded, lease, state, reason)


def _uncount(store: Store, lesson: Lesson, lease: Lease, pauses: Sequence[float] = ()) -> None:
    """Take back the present attempt from the number of attempts. ``lesson`` is the lesson before this attempt.

    If the store fails, try again after each of the ``pauses`` (in seconds). The caller reports an error of its own, so
    this function raises none.
    """
    for pause in (*pauses, None):
        try:
            _written(store, read_lesson(store, lesson.model, lesson.number), lease, attempts=lesson.attempts)
            return
        except StoreError:
            if pause is not None:
                time.sleep(pause)
        except UserError:
            return


def _ended(store: Store, lesson: Lesson, lease: Lease, state: State, reason: str) -> Lesson:
    """Record that a lesson is done. Returns the lesson.

    Its state is ``promoted`` if the gate has promoted the lesson's model, else ``state``.
    """
    done = dataclasses.replace(lesson, state=state, reason=reason)
    if (decision := _promotion(store, done)) is not None:
        # The model was promoted before the error, so the lesson has not failed. Only a part of its record is missing.
        reason = f"promoted, but the record is not complete: {reason or 'the lesson was canceled too late'}"
        done = dataclasses.replace(
            done, state="promoted", reason=reason, digest=decision.digest, decision=decision.summary()
        )
    return _written(store, done, lease, finished=now())


def _teach(store: Store, lesson: Lesson, machine: Machine, lease: Lease) -> Lesson:
    _check_canceled(store, lesson)
    if not lesson.parent and taught_ref(lesson) in list_checkpoints(store, lesson.model, LESSON):
        raise UserError(
            f"{taught_ref(lesson).prefix} exists, but its lesson is not in this store; use the folder lessons/ that "
            "belongs to the models"
        )
    parent = _parent(store, lesson)
    lesson = dataclasses.replace(
        lesson,
        state="training",
        attempts=lesson.attempts + 1,
        parent={"revision": parent.ref.revision, "digest": parent.weights_digest},
        lineage=(*lineage(parent.meta), lesson.number),
        before={},
        training={},
    )
    write_lesson(store, lesson)
    items = with_statements(read_lesson_items(store, lesson))
    check_lengths(items, parent.tokenizer, parent.config.context_length)
    items = _worked(items)
    practice, examined = _drills(store, items, lesson)
    worded = all_wordings(items)
    check_agreement(items, worded)
    memory = remember(store, parent, lesson, asked_by(items, worded), _worked)
    lesson = _written(store, lesson, lease, conflicts=tuple(each.to_json() for each in memory.conflicts))
    log.info(
        "lesson begins", extra={"lesson": lesson.number, "model": lesson.model, "conflicts": len(memory.conflicts)}
    )
    similar = _neighbors(store, memory, items, lesson)
    exam = examination(store, parent, lesson, items, worded, memory, examined, similar)
    before = exam.take(store, parent, lesson)
    _check_canceled(store, lesson)
    lesson = _written(store, lesson, lease, before=before["groups"])
    inputs = {"base": parent.weights_digest, "items": str(lesson.items["digest"])}
    taught = _taught(store, lesson, inputs)
    if taught is None:
        row_tokens = parent.config.context_length + 1
        documents = curriculum(items, worded, memory, lesson.plan, parent.tokenizer, row_tokens, practice)
        settings = StageSettings(
            home=str(store),
            model=lesson.model,
            seed=lesson.plan.seed,
            device=machine.device,
            threads=machine.threads,
            compile=False,
            device_batch_rows=8,
        )
        runtime = Runtime(store, choose_device(machine.device), ALONE, lease)

        def tested(history: Sequence[Mapping[str, float]], seconds: float) -> None:
            if is_canceled(store, lesson):
                raise LessonCanceled
            training = {"steps": history[-1]["step"], "seconds": round(seconds, 3), "history": list(history)}
            write_lesson(store, dataclasses.replace(lesson, training=training))

        trained = train(
            parent, documents, exam.probes, exam.earlier, exam.others, lesson.plan, settings, runtime, tested
        )
        save_checkpoint(
            store,
            taught_ref(lesson),
            model=trained.model,
            tokenizer=parent.tokenizer,
            meta={
                "settings": {},
                "inputs": inputs,
                "base": parent.ref.revision,
                "lessons": list(lesson.lineage),
                "examples": parent.meta.get("examples", []),
                "plan": {"steps": trained.steps, "batch_tokens": lesson.plan.batch_tokens, "way": trained.way},
                "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
                "flops_per_token": parent.config.flops_per_token,
                "precision": trained.precision,
                "dtype": str(trained.model.compute_dtype).removeprefix("torch."),
                "device": runtime.device.type,
                "hardware": describe_machine() | {"ranks": 1},
                "history": trained.history,
                "train_seconds": round(trained.seconds, 3),
                "finished": True,
                "step": lesson.number,
            },
            lease=lease,
        )
        taught = load_checkpoint(store, taught_ref(lesson))
    training = {
        "steps": taught.meta["plan"]["steps"],
        "seconds": taught.meta["train_seconds"],
        "history": taught.meta["history"],
    }
    lesson = _written(store, lesson, lease, state="examining", training=training)
    after = exam.take(store, taught, lesson)
    _check_canceled(store, lesson)
    decision = _promotion(store, lesson) or decide(
        store, taught, lesson_gate(lesson, exam), promoting=True, expected=parent.ref
    )
    return _written(
        store,
        lesson,
        lease,
        state="promoted" if decision.promoted else "refused",
        finished=now(),
        after=after["groups"],
        wrong=tuple(wrong(after)[:_MOST_QUOTED]),
        lost=tuple(lost(before, after)[:_MOST_QUOTED]),
        decision=decision.summary(),
        digest=taught.weights_digest,
    )


def _written(store: Store, lesson: Lesson, lease: Lease, **changes: Any) -> Lesson:
    """Store the lesson with the fields in ``changes`` replaced. Returns the changed lesson."""
    changed = dataclasses.replace(lesson, **changes)
    lease.renew()
    write_lesson(store, changed)
    return changed


def taught_ref(lesson: Lesson) -> CheckpointRef:
    """The name of the checkpoint of the model that the lesson has taught."""
    return CheckpointRef(lesson.model, LESSON, lesson.number)


def _check_canceled(store: Store, lesson: Lesson) -> None:
    """Raise LessonCanceled if somebody has canceled the lesson before its promotion."""
    if is_canceled(store, lesson) and _promotion(store, lesson) is None:
        raise LessonCanceled


def _worked(items: Sequence[Item]) -> list[Item]:
    """The items. If the last answer of an item is Python code and a text, the output of the code is added."""
    if all(part.type == "text" for item in items for message in item.messages for part in message.parts):
        return list(items)
    with SandboxExecutor() as sandbox:
        return [with_output(item, sandbox) for item in items]


def _drills(store: Store, items: Sequence[Item], lesson: Lesson) -> tuple[dict[int, list[Drill]], list[Drill]]:
    """Two groups of drills, which are worked examples with new arguments.

    The first group is for training, by the index of the item with the worked example. The second group is for the
    examination.
    """
    practice, examined = dict[int, list[Drill]](), list[Drill]()
    abilities = {i: ability for i, item in enumerate(items) if (ability := ability_of(item)) is not None}
    if not abilities:
        return practice, examined
    with SandboxExecutor() as sandbox:
        for i, example in abilities.items():
            rng = random.Random(f"{lesson.plan.seed}/ability/{i}")  # noqa: S311
            practice[i], further = drills(example, sandbox, rng, lambda: _check_canceled(store, lesson))
            examined += further
    return practice, examined


def _neighbors(store: Store, memory: Memory, items: Sequence[Item], lesson: Lesson) -> list[Drill]:
    """The lesson's questions with other arguments, if fine-tuning taught the model to compute the answers."""
    # If the model wrote the conversations itself, only validation conversations are used: the model was sure of their
    # answers. Its other answers may have code that does not answer the question.
    questions = computed(memory.validation if memory.own else memory.conversations, items)
    if not questions:
        return []
    rng = random.Random(f"{lesson.plan.seed}/neighbors")  # noqa: S311
    with SandboxExecutor() as sandbox:
        return neighbors(questions, memory.answered, sandbox, rng, lambda: _check_canceled(store, lesson))


def _parent(store: Store, lesson: Lesson) -> Checkpoint:
    """The checkpoint from which the training starts: the promoted checkpoint.

    If the gate has promoted the lesson's own checkpoint already, the training started from the checkpoint that was
    promoted before it.
    """
    if _promotion(store, lesson) is not None:
        return load_checkpoint(store, CheckpointRef.parse(lesson.model, lesson.parent["revision"]))
    current = promoted(store, lesson.model)
    if current is None:
        raise UserError(f"no revision of model {lesson.model!r} is promoted in {store}; train and promote it first")
    if current.stage == "base":
        raise UserError(f"{lesson.model} {current.revision} cannot chat yet; fine-tune it first")
    return load_checkpoint(store, current)


def _taught(store: Store, lesson: Lesson, inputs: dict[str, str]) -> Checkpoint | None:
    """The taught model, if an earlier process has finished the training from the same weights and items; else None."""
    try:
        found = load_checkpoint(store, taught_ref(lesson))
    except DamagedCheckpoint:
        return None
    return found if found.meta.get("inputs") == inputs else None


def lesson_gate(lesson: Lesson, exam: Examination) -> Gate:
    """The rules that a taught model must meet to be promoted."""
    asked = collections.Counter(question.group for question in exam.task.questions)
    require = [f"lesson.{name}>={least}" for name, least in _LEAST.items() if name in asked]
    kept = [f"lesson.kept:{lesson.plan.margin}"] if "kept" in exam.groups else []

    def margins(prefix: str, margin: float) -> list[str]:
        # In each group whose name begins with ``prefix``, one right answer may be lost. In a small group, one answer
        # may be a larger share than ``margin``, so the margin is then raised to this share.
        groups = sorted(group for group in asked if group.startswith(prefix))
        return [f"lesson.{group}:{max(margin, math.ceil(1000 / asked[group]) / 1000)}" for group in groups]

    kept += margins("kept.", _KIND)
    own, near = margins("own", _OWN), margins("near.", _NEAR)
    earlier = [f"lesson.earlier:{_EARLIER}"] if "earlier" in asked else []
    loss = [f"lesson.kept_loss:{_LOSS}"] if exam.heard else []
    return Gate(tuple(require), (*kept, *own, *near, *earlier, *loss))


def _promotion(store: Store, lesson: Lesson) -> Decision | None:
    """The gate's decision that promoted the lesson's model; None if the model was never promoted.

    The lesson's own record may lack the promotion, because a process may have died after the promotion and before it
    wrote the record. This function reads the gate's decisions instead, so that a lesson that was promoted and then
    rolled back is not promoted again.
    """
    # A lesson without a parent never began. If there is a checkpoint with its number nevertheless, that checkpoint
    # belongs to another lesson, whose record is not in this store (for example because the folder ``lessons/`` was
    # replaced).
    if not lesson.parent:
        return None
    ref = taught_ref(lesson)
    try:
        digest = weights_digest(store, ref)
    except DamagedCheckpoint:
        return None
    # Decisions that promoted the taught checkpoint. The first is the gate's decision about the lesson, and later
    # decisions are roll-backs to the lesson.
    made = [each for each in decisions(store, ref) if each.promoted and each.digest == digest]
    if not made:
        return None
    # A decision does not prove a promotion, because the decision is written first, and the process may have died before
    # the promotion.
    happened = promoted(store, lesson.model) == ref or was_replaced(store, ref)
    return made[0] if happened else None
