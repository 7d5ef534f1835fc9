"""Text that describes the progress of jobs, for the status line of a call."""

from __future__ import annotations

from collections.abc import Sequence as Jobs

from moondream_cv.engine.heads import Head
from moondream_cv.engine.sequence_state import Job
from moondream_cv.engine.sequences import RegionSequence, TextSequence
from moondream_cv.requests import Caption, Chat, Detect, Point, Query, Request

MAX_CHARACTERS = 48  # length of the last words


def describe_jobs(jobs: Jobs[Job]) -> str:
    """Return the progress of decoding: objects or words of a single job, or counts of several jobs.

    Args:
        jobs: All jobs of the call, running or done.
    """
    if len(jobs) > 1:
        return count_jobs(jobs)
    return "".join(_describe(job) for job in jobs)


def count_jobs(jobs: Jobs[Job]) -> str:
    """Return the number of complete requests, and of objects or points if there are any.

    Args:
        jobs: All jobs of the call, running or done.
    """
    done = sum(job.done for job in jobs)
    text = f"{done} of {len(jobs)} requests"
    objects = sum(len(job.sequence.pieces) for job in jobs if isinstance(job.sequence, RegionSequence))
    return f"{text}, {_plural(objects, 'object')}" if objects else text


def _describe(job: Job) -> str:
    title, sequence = _title(job.request), job.sequence
    if isinstance(sequence, RegionSequence):
        return f"{title}: {_plural(len(sequence.pieces), 'object' if sequence.has_size else 'point')}"
    if not isinstance(sequence, TextSequence):
        return title
    if sequence.head is Head.REASONING:
        return f"Reasoning: {_plural(sequence.num_tokens, 'token')}"
    return f"{title}: {_last_words(sequence) or _plural(sequence.num_tokens, 'token')}"


def _title(request: Request) -> str:
    if isinstance(request, Detect):
        return f"Detecting {request.object!r}"
    if isinstance(request, Point):
        return f"Pointing at {request.object!r}"
    if isinstance(request, Query | Chat):
        return "Answering"
    return "Captioning" if isinstance(request, Caption) else "Detecting the gaze"


def _last_words(sequence: TextSequence) -> str:
    """Return the end of the text so far, with dots in front if it is cut."""
    text = ""
    for piece in reversed(sequence.pieces):
        if not isinstance(piece, str) or len(text) > MAX_CHARACTERS:
            break
        text = piece + text
    text = " ".join(text.split())
    if len(text) <= MAX_CHARACTERS:
        return text
    _, space, tail = text[-MAX_CHARACTERS:].partition(" ")
    return f"...{tail if space else text[-MAX_CHARACTERS:]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
