"""What is left to ask where a server dies; real vLLM servers die in `integration`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.rollout.server_client import (
    Asked,
    Sample,
    Server,
    ServerLost,
    alongside,
    sample_all,
)

ANSWER = {"token_ids": [5], "logprobs": {"content": [{"logprob": -0.5}]}, "finish_reason": "stop"}


@contextmanager
def serving(answers: int, health: int = 200) -> Iterator[str]:
    """A server that gives so many answers, then breaks every connection, or errors if negative."""
    lock, given = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                given[0] += 1
                dead = given[0] > abs(answers)
            if dead and answers >= 0:
                self.connection.close()
            else:
                self.reply(500 if dead else 200, {"choices": [ANSWER]})

        def do_GET(self) -> None:
            self.reply(health, {})

        def reply(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def ask(hosts: list[str], requests: int = 4) -> tuple[str, set[int]]:
    """Asks each host as many requests, two at a time; why some are left, and which are answered."""
    answered: set[int] = set()

    def done(index: int, sample: Sample) -> None:
        assert sample == Sample((5,), (-0.5,), stopped=True)
        answered.add(index)

    shares = [
        (Server(host), [Asked(requests * n + i, (1,), {}) for i in range(requests)])
        for n, host in enumerate(hosts)
    ]
    return sample_all(shares, 2, done), answered


def test_a_dead_server_leaves_its_own_requests_alone() -> None:
    with ExitStack() as stack:
        whole, dying = (stack.enter_context(serving(answers)) for answers in (9, 2))
        lost, answered = ask([whole, dying])
    assert lost.startswith(f"rollout.server_hosts: {dying} stopped answering: ")
    assert answered >= {0, 1, 2, 3}
    assert len(answered) == 6


def test_a_server_that_errs_and_lives_ends_the_run() -> None:
    with serving(-2) as host, pytest.raises(UserError, match=r"refuses .*: 500") as caught:
        ask([host])
    assert not isinstance(caught.value, ServerLost)


def test_a_server_whose_engine_has_died_is_lost() -> None:
    with serving(-2, health=503) as host:
        lost, answered = ask([host])
    assert "refuses /inference/v1/generate: 500" in lost
    assert len(answered) == 2


def test_a_dead_server_explains_what_follows() -> None:
    def refused() -> None:
        raise UserError("cannot go on")

    def lost() -> None:
        raise ServerLost("died")

    def broken() -> None:
        raise RuntimeError("connection closed")

    with pytest.raises(ServerLost, match="died"):
        alongside([refused, lost], broken)
    with pytest.raises(UserError, match="cannot go on"):
        alongside([refused], broken)
    with pytest.raises(UserError, match="no weights can be sent: connection closed"):
        alongside([lambda: None], broken)
