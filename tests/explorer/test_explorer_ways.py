"""The ways to the explorer (a loopback server, a widget), its background thread, and what the sweeps below do for
it."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs, in_background

import workbench
from workbench.errors import InputError
from workbench.explorer.api import forget, session_of
from workbench.explorer.server import ExplorerServer
from workbench.explorer.widget import STATIC
from workbench.explorer.worker import Part, Worker
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate
from workbench.patching.execution import Execution
from workbench.patching.path import path_patch
from workbench.patching.progress import Progress, watched
from workbench.values.refs import Head, Receiver

METRIC: dict[str, str] = {"metric": "logit_difference"}


class TestSweepsForAWatcher:
    """A sweep tells its thread's watcher how far it is, and ends where the watcher raises."""

    def test_shares_rise_to_one(self, load_teacher: Callable[..., Teacher]) -> None:
        teacher, pairs = load_teacher(), entity_pairs()
        for sweep in (
            lambda: path_patch(teacher, pairs, **METRIC, execution=Execution(batch=5)),
            lambda: ablate(teacher, pairs, "zero", **METRIC),
        ):
            shares: list[float] = []
            with watched(shares.append):
                sweep()
            assert shares == sorted(shares)
            assert len(shares) > 1
            assert shares[-1] == pytest.approx(1.0)

    def test_a_raise_ends_it_and_leaves_nothing(self, load_teacher: Callable[..., Teacher]) -> None:
        teacher, pairs = load_teacher(), entity_pairs()
        heard: list[float] = []

        def once(share: float) -> None:
            heard.append(share)
            raise KeyError("enough")

        with watched(once), pytest.raises(KeyError):
            path_patch(teacher, pairs, **METRIC, execution=Execution(engine="hooks"))
        assert len(heard) == 1
        path_patch(teacher, pairs, **METRIC)
        assert len(heard) == 1, "outside the context nobody is told"

    def test_some_senders_are_those_of_all(self, load_teacher: Callable[..., Teacher]) -> None:
        teacher, pairs = load_teacher(), entity_pairs()
        into, some = [Receiver(Head(2, 1), "q")], [Head(1, 3), Head(0, 2)]
        whole = path_patch(teacher, pairs, **METRIC, receivers=into)
        part = path_patch(teacher, pairs, **METRIC, receivers=into, senders=some)
        for head in teacher.heads:
            if head in some:
                torch.testing.assert_close(part.at(head), whole.at(head))
                assert whole.at(head).abs().max() > 1e-3
            else:
                assert part.at(head).isnan().all()
        with pytest.raises(InputError, match="no head"):
            path_patch(teacher, pairs, **METRIC, senders=[Head(7, 0)])

    def test_a_sweep_of_some_senders_has_its_own_file(
        self, load_teacher: Callable[..., Teacher], tmp_path: Path
    ) -> None:
        teacher, pairs, file = load_teacher(), entity_pairs(), tmp_path / "scores.safetensors"
        path_patch(teacher, pairs, **METRIC, senders=[Head(0, 0)], execution=Execution(file=file))
        with pytest.raises(InputError, match="another"):
            path_patch(teacher, pairs, **METRIC, execution=Execution(file=file))


def test_one_thread_at_a_time_runs_a_model(load_teacher: Callable[..., Teacher]) -> None:
    """While one thread edits a model's forwards, another's plain forward waits: it never sees the edit."""
    teacher, pairs = load_teacher(), entity_pairs()
    clean, found, started = teacher.final_logits(pairs.clean, pairs.mask), [], threading.Event()

    def other() -> None:
        started.set()
        with torch.no_grad():
            found.append(teacher.final_logits(pairs.clean, pairs.mask))

    thread = threading.Thread(target=other)
    with hooks.edit(teacher.model, {hooks.z(0): torch.zeros_like}):
        edited = teacher.final_logits(pairs.clean, pairs.mask)
        thread.start()
        started.wait()
        thread.join(timeout=0.3)
        assert not found, "it waits"
    thread.join()
    torch.testing.assert_close(found[0], clean)
    assert (edited - clean).abs().max() > 1e-2


class TestWorker:
    """What is wanted is computed once, in order; what is no longer wanted, or stopped, ends at its next chunk."""

    @pytest.fixture
    def worker(self) -> Iterator[Worker]:
        made = Worker()
        yield made
        made.close()

    def endless(self, started: threading.Event, release: threading.Event) -> Callable[[], str]:
        """A sweep that goes on, chunk by chunk, until it is ended or released."""

        def run() -> str:
            started.set()
            while not release.wait(0.005):
                Progress.of((2,), 1).mark([0], [0])
            return "done"

        return run

    def test_in_order_and_once(self, worker: Worker) -> None:
        runs: list[int] = []
        parts = [
            Part(key=(number,), label=str(number), run=lambda number=number: runs.append(number))
            for number in (2, 0, 1)
        ]
        for _ in range(2):
            worker.want(parts)
            assert worker.wait(60.0)
        assert runs == [2, 0, 1]
        assert worker.pending() == []

    def test_errors_are_words(self, worker: Worker) -> None:
        def refuse() -> None:
            raise InputError("choose another")

        worker.want([Part(key=("a",), label="a", run=refuse), Part(key=("b",), label="b", run=lambda: 1 / 0)])
        assert worker.wait(60.0)
        assert [worker.outcome((name,)).error for name in "ab"] == [
            "choose another",
            "ZeroDivisionError: division by zero",
        ]  # type: ignore[union-attr]

    def test_stop_and_go_on(self, worker: Worker) -> None:
        started, release = threading.Event(), threading.Event()
        worker.want([Part(key=("long",), label="a long sweep", run=self.endless(started, release))])
        assert started.wait(60)
        while not worker.pending()[0]["share"]:
            release.wait(0.005)
        assert worker.pending() == [{"label": "a long sweep", "share": 0.5}]
        worker.stop()
        assert worker.wait(60.0)
        assert worker.stopped() == ["a long sweep"]
        assert worker.outcome(("long",)) is None
        release.set()
        worker.resume()
        worker.want([Part(key=("long",), label="a long sweep", run=self.endless(started, release))])
        assert worker.wait(60.0)
        assert worker.outcome(("long",)).value == "done"  # type: ignore[union-attr]

    def test_what_is_no_longer_wanted_gives_way(self, worker: Worker) -> None:
        started, release = threading.Event(), threading.Event()
        worker.want([Part(key=("old",), label="old", run=self.endless(started, release))])
        assert started.wait(60)
        worker.want([Part(key=("new",), label="new", run=lambda: "here")])
        assert worker.wait(60.0)
        assert worker.outcome(("new",)).value == "here"  # type: ignore[union-attr]
        assert worker.outcome(("old",)) is None

    def test_closing_ends_what_runs(self) -> None:
        worker, started, release = Worker(), threading.Event(), threading.Event()
        worker.want([Part(key=("long",), label="long", run=self.endless(started, release))])
        assert started.wait(60)
        worker.close()
        assert not any(thread.name == "workbench explorer" for thread in threading.enumerate())


class TestServer:
    """Loopback, token, Host, Origin, JSON: each alone is enough to be refused."""

    @pytest.fixture
    def server(self, load_teacher: Callable[..., Teacher]) -> Iterator[ExplorerServer]:
        session = session_of(load_teacher(), task="entity_tracking", options={"boxes": 3}, prompts=3)
        made = ExplorerServer(session)
        with in_background(made):
            yield made
        session.close()

    def ask(
        self, server: ExplorerServer, method: str, path: str, body: bytes | None = None, **changed: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """A request with everything right but what is changed (None: left out)."""
        host = f"127.0.0.1:{server.server_port}"
        headers = {
            "Host": host,
            "X-Workbench-Token": server.token,
            "Content-Type": "application/json",
            "Origin": f"http://{host}",
        }
        headers |= {name.replace("_", "-"): value for name, value in changed.items() if value is not None}
        sent = {name: value for name, value in headers.items() if changed.get(name.replace("-", "_"), "") is not None}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        with closing(connection):
            connection.putrequest(method, path, skip_host=True)
            for name, value in {**sent, "Content-Length": str(len(body or b""))}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def test_a_command_is_answered(self, server: ExplorerServer) -> None:
        assert server.server_address[0] == "127.0.0.1"
        status, headers, body = self.ask(server, "POST", "/command", json.dumps({"do": "hello"}).encode())
        assert status == 200
        assert json.loads(body)["setup"]["models"][0]["layers"] == 3
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers

    @pytest.mark.parametrize("path", ["/", "/explorer.js", "/page.js", "/explorer.css"])
    def test_the_page_is_served_to_who_has_the_token(self, server: ExplorerServer, path: str) -> None:
        given = self.ask(server, "GET", f"{path}?token={server.token}", X_Workbench_Token=None, Origin=None)
        assert given[0] == 200
        assert b"__TOKEN__" not in given[2]
        for query in ("", "?token=", "?token=wrong", f"?token={server.token[:-1]}"):
            status, _, body = self.ask(server, "GET", f"{path}{query}", X_Workbench_Token=None, Origin=None)
            assert status == 403
            assert server.token.encode() not in body

    @pytest.mark.parametrize(
        ("changed", "status"),
        [
            ({"X_Workbench_Token": None}, 403),
            ({"X_Workbench_Token": "wrong"}, 403),
            ({"X_Workbench_Token": "ünïcode"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Host": None}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Sec_Fetch_Site": "cross-site"}, 403),
            ({"Content_Type": "text/plain"}, 415),
            ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(
        self, server: ExplorerServer, changed: dict[str, str | None], status: int
    ) -> None:
        before = server.session.state
        body = json.dumps({"do": "toggle", "side": "teacher", "head": "L0H0"}).encode()
        assert self.ask(server, "POST", "/command", body, **changed)[0] == status
        assert server.session.state == before

    @pytest.mark.parametrize(
        ("body", "status"),
        [(b"{", 400), (b"[1]", 400), (b"{}", 200), (b" " * (1 << 20) + b"{}", 413)],
        ids=["half", "list", "empty", "huge"],
    )
    def test_bad_bodies(self, server: ExplorerServer, body: bytes, status: int) -> None:
        try:
            assert self.ask(server, "POST", "/command", body)[0] == status
        except ConnectionError:  # the server answers before it has read 1 MB, and may close first
            assert status == 413

    def test_there_is_nothing_else(self, server: ExplorerServer) -> None:
        for path in ("/etc/passwd", "/../server.py", "/static/explorer.js", "/explorer.js/", "/command"):
            assert self.ask(server, "GET", path)[0] == 404
        assert self.ask(server, "POST", "/explorer.js", b"{}")[0] == 404
        assert self.ask(server, "PUT", "/command", b"{}")[0] == 501

    def test_a_taken_port_is_an_input_error(self, server: ExplorerServer) -> None:
        with pytest.raises(InputError, match="--port"):
            ExplorerServer(server.session, port=server.server_port)


def test_the_page_names_no_other_machine() -> None:
    for file in STATIC.iterdir():
        text = file.read_text()
        assert "http://" not in text, file
        assert "https://" not in text, file
        assert "@import" not in text, file
        assert "innerHTML" not in text, "text from prompts never becomes markup"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # traitlets' own
def test_the_widget_answers_messages(load_teacher: Callable[..., Teacher]) -> None:
    try:
        explorer = workbench.explore(
            load_teacher(), task="entity_tracking", options={"boxes": 3}, prompts=3, name="widget"
        )
        sent: list[dict[str, Any]] = []
        explorer.send = lambda content, buffers=None: sent.append(content)  # type: ignore[method-assign]
        explorer._handle_custom_msg({"id": 7, "command": {"do": "toggle", "side": "teacher", "head": "L1H1"}}, [])
        assert sent[0]["id"] == 7
        assert sent[0]["view"]["circuits"]["teacher"]["heads"] == [{"head": "L1H1", "role": "picked"}]
        explorer.session.settle()
        assert explorer.circuit.heads == explorer.circuit_of("teacher").heads == (Head(1, 1),)
        assert explorer.scores is not None
        assert float(explorer.scores.mean()[1, 1]) == pytest.approx(
            explorer.session.view()["maps"]["panels"]["teacher"]["values"][1][1], rel=1e-4
        )
        assert "Head(1, 1)" in explorer.code
        sent.clear()
        view = explorer.choose(average=True, method="activation")
        assert view["settings"]["average"]
        assert not view["pending"]
        assert explorer.select("L0H1")["head"]["impacts"].keys() >= {"zero", "counterfactual"}
        assert explorer.toggle(Head(0, 1))["circuits"]["teacher"]["on_prompts"] is not None
        assert explorer.compare()["circuits"]["teacher"]["random"] is not None
        assert explorer.clear()["circuits"]["teacher"]["heads"] == []
        assert explorer.pick(1)["pair"]["picked"] == 1
        second = explorer.session.subjects["teacher"].listed()[1:2]
        assert explorer.pairs.fingerprint() == second.fingerprint()
        assert explorer.scores_of("teacher") is explorer.scores
        assert [message["id"] for message in sent] == [None] * 6, "the page follows what Python does"
        for wrong in (lambda: explorer.pick(99), lambda: explorer.select("L9H9"), lambda: explorer.choose(colour=1)):
            with pytest.raises(InputError):
                wrong()
        assert len(sent) == 6
        explorer.toggle("L1H1")
        again = workbench.explore(
            load_teacher(), task="entity_tracking", options={"boxes": 3}, prompts=3, name="widget"
        )
        assert again.circuit == explorer.circuit, "the state survives re-running the cell"
    finally:
        forget("widget")
