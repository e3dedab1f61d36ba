"""Whatever is sent to the explorer gets an answer: odd commands, odd names, odd requests, stalled connections."""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.errors import InputError
from workbench.explorer import server as server_module
from workbench.explorer import worker as worker_module
from workbench.explorer.api import session_of
from workbench.explorer.budget import bytes_of_runs, tokens_of
from workbench.explorer.material import MOST_TOKENS
from workbench.explorer.server import MOST_CONNECTIONS, ExplorerServer
from workbench.explorer.session import Session
from workbench.explorer.worker import Part, Worker
from workbench.models.hooked_model import Teacher
from workbench.tasks.prompts import PromptSettings

ODD: list[Any] = [
    None,
    True,
    -1,
    10**300,
    1.5,
    float("nan"),
    "",
    "\x00",
    "\ud800",
    "\n",
    "x" * 300,
    "x" * 200_000,
    "L" + "9" * 5000 + "H0",
    "L٣H٣",
    [],
    ["teacher"],
    {},
    {"side": "teacher"},
    ["x"] * 1000,
]


@pytest.fixture
def session(load_teacher: Callable[..., Teacher], tmp_path: Path) -> Iterator[Session]:
    made = session_of(load_teacher(), task="entity_tracking", options={"boxes": 3}, prompts=4, folder=tmp_path)
    made.patience = 0.0
    yield made
    made.close()


@pytest.mark.parametrize(
    ("do", "key"),
    [
        ("pick", "index"),
        ("select", "head"),
        ("select", "side"),
        ("toggle", "head"),
        ("clear", "side"),
        ("save", "name"),
        ("save", "side"),
        ("set", "method"),
        ("set", "average"),
        ("set", "position"),
        ("set", "nothing"),
        ("type", "clean"),
        ("type", "answer"),
        ("nothing", "x"),
    ],
)
def test_odd_values_get_an_answer_and_change_nothing(session: Session, do: str, key: str) -> None:
    pair = session.state.pair
    typed = {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer, "distractor": pair.distractor}
    before = session.state
    for odd in ODD:
        whole = (
            {"side": "teacher", "head": "L0H0", **(typed if do == "type" else {})}
            if do in ("select", "toggle", "type")
            else {}
        )
        start = time.monotonic()
        view = session.handle({"do": do, **whole, key: odd})
        assert time.monotonic() - start < 10
        json.dumps(view, allow_nan=False)
        if (do, key, odd) != ("set", "average", True):
            assert view["error"] is not None, (do, key, odd)
            assert len(view["error"]) <= 2000
            assert session.state == before, (do, key, odd)
        else:
            session.state = before


@pytest.mark.parametrize("command", [None, [], "x", 3, {"do": ["pick"]}, {"do": {}}, {"do": "pick", "index": True}, {}])
def test_what_is_no_command(session: Session, command: Any) -> None:
    view = session.handle(command)
    assert view["error"]


def test_numbers_are_not_switches(session: Session) -> None:
    assert session.handle({"do": "set", "average": 1})["error"]
    assert session.handle({"do": "set", "average": True})["error"] is None


def test_a_closed_session_answers(session: Session) -> None:
    session.close()
    assert "closed" in session.handle({"do": "poll"})["error"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "something else", "dangling"])
def test_saving_over_what_is_no_circuit(session: Session, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "something else":
        path.write_text("[" * 20000)
    else:
        path.symlink_to(tmp_path / "nowhere" / "c.json")
    session.handle({"do": "toggle", "side": "teacher", "head": "L0H0"})
    view = session.handle({"do": "save", "name": "c.json"})
    if kind == "dangling":
        assert view["error"] is None
        assert not (tmp_path / "nowhere").exists()
    else:
        assert "choose another name" in view["error"]


def test_saving_where_nothing_can_be_written(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    session.folder = tmp_path / "file"
    session.handle({"do": "toggle", "side": "teacher", "head": "L0H0"})
    assert "can't be written" in session.handle({"do": "save", "name": "c"})["error"]


def test_long_prompts_are_refused_before_any_tensor_is_made(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed pair of 132,500 tokens, and one just beyond the model's context."""
    context = session.subjects["teacher"].model.model.cfg.n_ctx
    assert context < MOST_TOKENS

    def no_tensor(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was made")

    clean, corrupt = session.state.pair.clean, session.state.pair.corrupt
    typed = {"answer": session.state.pair.answer, "distractor": session.state.pair.distractor}
    tokens = len(session.subjects["teacher"].model.tokenizer(clean)["input_ids"])
    for times in (132_500 // tokens, context // tokens + 1):
        command = {"do": "type", "clean": " ".join([clean] * times), "corrupt": " ".join([corrupt] * times), **typed}
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", no_tensor)
            patch.setattr(torch, "zeros", no_tensor)
            patch.setattr(torch, "full", no_tensor)
            error = session.handle(command)["error"]
        assert f"reads {context} at most" in error
    times = context // tokens
    fits = {"do": "type", "clean": " ".join([clean] * times), "corrupt": " ".join([corrupt] * times), **typed}
    assert session.handle(fits)["error"] is None


def test_long_pairs_of_a_file_are_refused(load_teacher: Callable[..., Teacher], session: Session) -> None:
    from dataclasses import replace

    pair = session.state.pair
    long = replace(pair, clean=" ".join([pair.clean] * 30), corrupt=" ".join([pair.corrupt] * 30), positions={})
    with pytest.raises(InputError, match=r"a prompt has \d+ tokens; .* 256 at most"):
        session_of(load_teacher(), pairs=[long])


def test_a_memory_budget_cuts_what_is_several_and_refuses_what_is_one(
    load_teacher: Callable[..., Teacher], session: Session
) -> None:
    """The bytes grow with the prompts, and faster than the tokens; what is cut is said, and the exported lines cut it
    too; what does not fit is refused before it is encoded."""
    model = session.subjects["teacher"].model
    tokens = max(tokens_of(pair, model, PromptSettings()) for pair in session.material.shown.pairs)
    one = bytes_of_runs(model, 1, tokens)
    assert bytes_of_runs(model, 3, tokens) == 3 * one
    assert bytes_of_runs(model, 1, 2 * tokens) > 2 * one
    about: dict[str, Any] = {"task": "entity_tracking", "options": {"boxes": 3}, "prompts": 4}
    small = session_of(model, **about, memory=int(2.5 * one))
    try:
        assert [len(each.pairs) for each in (small.material.shown, small.material.evaluated)] == [2, 2]
        assert "2 of 4 test prompts are used" in small.setup()["material"]["cut"]
        assert "[:2]" in small.handle({"do": "poll"})["code"]
        pair = small.state.pair
        typed = {"answer": pair.answer, "distractor": pair.distractor}
        command = {"clean": " ".join([pair.clean] * 3), "corrupt": " ".join([pair.corrupt] * 3), **typed}
        assert "budget is" in small.handle({"do": "type", **command})["error"]
        assert small.state.pair == pair
    finally:
        small.close()
    with pytest.raises(InputError, match="budget"):
        session_of(model, **about, memory=one // 2)
    for memory in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="bytes above 0"):
            session_of(model, **about, memory=memory)
    assert session.setup()["material"]["cut"] is None


def test_results_are_remembered_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "REMEMBERED", 10_000)
    worker = Worker()
    try:
        for number in range(8):
            worker.want([Part(key=(str(number),), label="x", run=lambda: torch.zeros(1000))])
            assert worker.wait(60.0)
        assert [worker.outcome((str(number),)) is not None for number in range(8)] == [False] * 6 + [True] * 2
        worker.want([Part(key=("large",), label="x", run=lambda: [0.5] * 10_000)])
        assert worker.wait(60.0), "what is wanted is kept, however large"
        assert worker.outcome(("large",)) is not None
    finally:
        worker.close()


def test_bos_is_an_option_that_is_shown_and_exported(load_teacher: Callable[..., Teacher]) -> None:
    teacher = load_teacher()
    made = session_of(
        teacher, task="entity_tracking", options={"boxes": 3}, prompts=3, settings=PromptSettings(prepend_bos=True)
    )
    try:
        assert made.setup()["material"]["title"] == "entity tracking (BOS prepended)"
        subject = made.subjects["teacher"]
        assert int(subject.pair(made.state.pair).clean[0, 0]) == teacher.tokenizer.bos_token_id
        view = made.settle()
        assert len(view["prompts"]["teacher"]["clean"]["tokens"]) == subject.pair(made.state.pair).clean.shape[1]
        space: dict[str, Any] = {}
        lines = view["code"]
        assert "PromptSettings(prepend_bos=True" in lines
        exec(lines, space)
        assert torch.equal(space["prompts"].clean, subject.pair(made.state.pair).clean)
        torch.testing.assert_close(space["scores"].mean(), made.scores().mean())  # pyright: ignore[reportOptionalMemberAccess]
    finally:
        made.close()


def test_a_tokenizer_without_a_chat_template_is_refused(load_teacher: Callable[..., Teacher]) -> None:
    with pytest.raises(InputError, match="no chat template"):
        session_of(load_teacher(), task="entity_tracking", options={"boxes": 3}, settings=PromptSettings(chat="user"))


# ---- the server


@pytest.fixture
def server(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExplorerServer]:
    monkeypatch.setattr(server_module, "READ_SECONDS", 1.0)
    monkeypatch.setattr(server_module._Handler, "timeout", 1.0)
    made = ExplorerServer(session, allowed=["localhost:9000", "lab.example"])
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def raw(server: ExplorerServer, content: bytes, *, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=seconds) as made:
        made.sendall(content)
        found = b""
        while True:
            try:
                part = made.recv(65536)
            except ConnectionResetError:
                return found
            if not part:
                return found
            found += part


def status(server: ExplorerServer, head: str, body: bytes = b"", **changed: str | None) -> int:
    """The status of a request whose lines of the head are given; {own}: the server's own name."""
    lines = head.format(own=f"127.0.0.1:{server.server_port}", token=server.token).split("\n")
    answer = raw(server, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
    return int(answer.split()[1]) if answer else 0


PAGE = "GET /?token={token} HTTP/1.1"
COMMAND = "POST /command HTTP/1.1\nHost: {own}\nX-Workbench-Token: {token}\nContent-Type: application/json"


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (PAGE + "\nHost: {own}", 200),
        (PAGE + "\nHost: localhost:9000", 200),
        (PAGE + "\nHost: LOCALHOST:9000\nOrigin: http://localhost:9000", 200),
        (PAGE + "\nHost: lab.example\nOrigin: https://lab.example", 200),
        (PAGE + "\nHost: localhost:9001", 403),
        (PAGE + "\nHost: lab.example:80", 403),
        (PAGE + "\nHost: evil.example", 403),
        (PAGE + "\nHost: {own}\nHost: evil.example", 403),
        (PAGE + "\nHost: evil.example\nHost: {own}", 403),
        (PAGE + "\nHost: {own}\nHost: {own}", 403),
        (PAGE + "\nHost: {own}, evil.example", 403),
        (PAGE + "\nHost:", 403),
        (PAGE, 403),
        (PAGE + "\nHost: {own}\nOrigin: http://evil.example", 403),
        (PAGE + "\nHost: {own}\nOrigin: http://{own}\nOrigin: http://evil.example", 403),
        (PAGE + "\nHost: {own}\nOrigin: null", 403),
        ("GET //[ HTTP/1.1\nHost: {own}\nX-Workbench-Token: {token}", 404),
        ("GET http://[ HTTP/1.1\nHost: {own}", 400),
        ("GET /?token=%ff%00 HTTP/1.1\nHost: {own}", 403),
        ("GET /explorer.js?token=\xff HTTP/1.1\nHost: {own}", 403),
        (COMMAND, 413),
        (COMMAND + "\nContent-Length: -1", 413),
        (COMMAND + "\nContent-Length: \xb2", 413),
        (COMMAND + "\nContent-Length: 1e3", 413),
        (COMMAND + "\nContent-Length: +2", 413),
        (COMMAND + "\nContent-Length: " + "9" * 5000, 413),
        (COMMAND + "\nContent-Length: 2\nContent-Length: 3", 413),
        (COMMAND + "\nContent-Length: 2\nTransfer-Encoding: chunked", 501),
    ],
)
def test_heads(server: ExplorerServer, head: str, code: int) -> None:
    answer = status(server, head, b"{}")
    assert answer in (code, 400) if "[" in head else answer == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"do": "poll"}', 200),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000, 400),
        (b"9" * 10_000, 400),
        (b'{"do": "pick", "index": true}', 200),
        (b'{"do": "pick", "index": ' + b"9" * 4000 + b"}", 200),
        (b'{"do": "save", "name": "\\ud800"}', 200),
        (b'{"do": ["x"]}', 200),
        (b"\xff", 400),
        (b"", 400),
    ],
)
def test_bodies(server: ExplorerServer, body: bytes, code: int) -> None:
    assert status(server, f"{COMMAND}\nContent-Length: {len(body)}", body) == code


def test_what_is_not_http(server: ExplorerServer) -> None:
    for content in (b"\x00" * 100 + b"\n", b"\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"X" * 70_000 + b"\r\n"):
        raw(server, content)
    assert status(server, PAGE + "\nHost: {own}") == 200


def test_stalled_connections_are_ended_and_threads_bounded(server: ExplorerServer) -> None:
    """Connections that say nothing, half a head, or a body that never comes; 500 of them used to hold 504 threads."""
    begun = threading.active_count()
    head = f"POST /command HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
    head += f"X-Workbench-Token: {server.token}\r\nContent-Length: 100\r\n\r\n"
    parts = [b"", b"GET / HT", head.encode() + b'{"do'] * 50
    made = []
    for part in parts:
        each = socket.create_connection(("127.0.0.1", server.server_port), timeout=5)
        made.append(each)
        each.sendall(part)
    time.sleep(0.3)
    assert threading.active_count() - begun <= MOST_CONNECTIONS
    deadline = time.monotonic() + 15
    while threading.active_count() > begun and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() == begun, "all have been ended"
    for each in made:
        each.close()
    assert status(server, PAGE + "\nHost: {own}") == 200


def test_a_byte_now_and_then_does_not_hold_a_thread(server: ExplorerServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as made:
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < 12:
                made.sendall(b"X")
                time.sleep(0.3)
        except OSError:
            pass
        assert time.monotonic() - begun < 10


def test_a_closed_tab_prints_nothing(server: ExplorerServer, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
            head = f"GET /explorer.js?token={server.token} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
            made.sendall(head.encode())
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", f"/?token={server.token}")
    assert connection.getresponse().status == 200
    connection.close()
    time.sleep(0.2)
    found = capfd.readouterr()
    assert "Traceback" not in found.err + found.out
    assert "Exception" not in found.err + found.out


@pytest.mark.parametrize("name", ["", "http://x", "a b", "x/y", "*", "a:b", "localhost:123456", "a\nb", "é"])
def test_addresses_that_are_none(session: Session, name: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        ExplorerServer(session, allowed=[name])


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_ports_that_are_none(session: Session, port: int) -> None:
    with pytest.raises(InputError, match="there is no port"):
        ExplorerServer(session, port=port)
