"""Results that are still to come: one after another, and all of a list."""

from __future__ import annotations

from concurrent.futures import Future, as_completed
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
U = TypeVar("U")


def known(result: T) -> Future[T]:
    """Returns a future that is done."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def then(first: Future[T], step: Callable[[T], Future[U]]) -> Future[U]:
    """Returns the future of a step that begins with the first result.

    `step` runs in the thread that settles `first`. What fails or is cancelled in either takes the
    whole with it; to cancel the whole cancels what has not begun.
    """
    whole: Future[U] = Future()

    def begin(done: Future[T]) -> None:
        if done.cancelled() or done.exception():
            _pass_on(done, whole)
            return
        second = step(done.result())
        _cancel_with(whole, second)
        second.add_done_callback(lambda settled: _pass_on(settled, whole))

    _cancel_with(whole, first)
    first.add_done_callback(begin)
    return whole


def results(futures: Sequence[Future[T]], advance: Callable[[int], None] | None = None) -> list[T]:
    """Waits for all and returns their results in order; whatever ends it cancels the rest.

    Args:
        futures: no two the same.
        advance: told that one more is done, after each.
    """
    try:
        for _ in as_completed(futures):
            if advance is not None:
                advance(1)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _pass_on(done: Future, whole: Future) -> None:
    """Gives a future the end of another, unless somebody has cancelled it meanwhile."""
    if done.cancelled():
        whole.cancel()
    if not whole.set_running_or_notify_cancel():
        return
    error = done.exception()
    if error:
        whole.set_exception(error)
    else:
        whole.set_result(done.result())


def _cancel_with(whole: Future, part: Future) -> None:
    whole.add_done_callback(lambda ended: ended.cancelled() and part.cancel())
