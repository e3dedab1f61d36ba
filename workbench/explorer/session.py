"""A session: the state, and what it takes to show it. A command comes in, a JSON view goes out; the page and the
transports know nothing else.

Commands are objects with a key `do`: `hello` (the view with all choices), `poll`, `pick` (index), `type` (clean,
corrupt, answer, distractor), `set` (method, metric, position, average, outside, weighted, layer: any of them), `select`
(side, head), `toggle` (side, head), `clear` (side), `role` (side, heads, role), `beside` (side, head, index; no head:
nothing beside), `match` (step), `load` (side, source), `step` (side, size), `compare`, `undo`, `stop`, `resume`, `save`
(name, overwrite), `restore` (view: what a view's `link` said). Bad input changes nothing and is answered in the view's
`error` (`asks`: it would be done with `overwrite`). What takes longer than `patience` goes on in the background;
`pending` names it, and `poll` asks again.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError, nearest
from workbench.explorer import parts, script
from workbench.explorer.budget import BUDGET, refuse_large, tokens_of, within
from workbench.explorer.labels import METHODS, METRIC_TITLES, OUTSIDE_TITLES, choices, colours
from workbench.explorer.library import MAP, Source, sources
from workbench.explorer.material import Material, text_of, typed_pair
from workbench.explorer.state import Beside, Side, State, empty_circuit, with_role
from workbench.explorer.subject import Subject
from workbench.explorer.view import plain
from workbench.explorer.worker import Worker
from workbench.matching import HeadMap
from workbench.models.hooked_model import HookedModel
from workbench.values.refs import Head
from workbench.values.scores import Scores

PATIENCE = 0.15
"""Seconds that a command waits for what it asks for, before it is answered with what there is."""
LONGEST_ERROR, LONGEST_NAME = 2000, 100
"""Characters of an answer's error, and bytes of a saved circuit's name."""
LONGEST_ROLE = 40
"""Characters of a role's name."""
LINKED = ("method", "metric", "position", "average", "outside", "weighted", "layer")
"""The settings that a link holds."""
UNDOS = 200
"""How many changes of circuits can be undone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What can be undone: the circuits as they were, and what was done to them."""

    circuits: Mapping[Side, Circuit]
    done: str


class Exists(InputError):
    """A circuit's file is there already, and whether to overwrite it is the user's to say."""


class Session:
    """Up to three models on one set of prompts."""

    def __init__(
        self,
        models: Mapping[Side, HookedModel],
        material: Material,
        *,
        head_map: HeadMap | None = None,
        circuits: Mapping[Side, Circuit] | None = None,
        folder: Path = Path(),
        patience: float = PATIENCE,
        memory: int = BUDGET,
        runs: Sequence[Path] = (),
    ) -> None:
        """`folder`: where circuits are saved, and looked for, as in the folders of `runs`. `memory`: bytes that the
        runs of the prompts in view may take. Errors: `InputError` for a circuit of another shape, and for prompts that
        a model can't read or that take too much."""
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise InputError(f"the explorer's memory is a number of bytes above 0, not {_word(memory)}.")
        material = within(material, list(models.values()), memory)
        self.material, self.head_map, self.folder, self.patience = material, head_map, folder, patience
        self.memory = memory
        self.subjects: dict[Side, Subject] = {side: Subject(side, model, material) for side, model in models.items()}
        begun: dict[Side, Circuit] = {side: empty_circuit(subject.shape) for side, subject in self.subjects.items()}
        for side, circuit in (circuits or {}).items():
            self._refuse_unfit(side, circuit)
            begun[side] = circuit
        first = material.shown.pairs[0]
        for subject in self.subjects.values():
            subject.pair(first)
        self.state = State(pair=first, picked=0, side="teacher", head=None, circuits=begun)
        self.runs, self.sources = tuple(runs), dict[str, Source]()
        self._look_for_circuits()
        self._past: list[Change] = []
        self._worker, self._lock = Worker(), threading.RLock()

    def _refuse_unfit(self, side: Side, circuit: Circuit) -> None:
        if side not in self.subjects:
            raise InputError(f"there is a circuit for the {side}, but no such model; {nearest(side, self.subjects)}")
        if circuit.shape != self.subjects[side].shape:
            raise InputError(
                f"the {side}'s circuit is of a model of shape {circuit.shape}, the model has "
                f"{self.subjects[side].shape}; give its own circuit."
            )

    def handle(self, command: Any, *, patience: float | None = None) -> dict[str, Any]:
        """Carry out a command and return the view. Never raises, whatever it is given: the view's `error` says
        what was wrong and what to do."""
        error, notice, asks, command = None, None, False, command if isinstance(command, Mapping) else {}
        with self._lock:
            before = self.state
            try:
                notice = self._act(command)
            except InputError as refused:
                error, asks = str(refused), isinstance(refused, Exists)
            except Exception as unforeseen:
                self.state = before
                error = f"this command can't be carried out ({type(unforeseen).__name__}: {unforeseen}); send another."
            error = None if error is None else error[:LONGEST_ERROR]
            try:
                self._worker.want(parts.parts(self.state, self.subjects, self.sources))
            except InputError as refused:
                error = error or str(refused)
        self._worker.wait(self.patience if patience is None else patience)
        with self._lock:
            view = self.view()
        extra = {"setup": plain(self.setup())} if command.get("do") == "hello" else {}
        return {**view, "error": error, "asks": asks, "notice": notice, **extra}

    def _act(self, command: Mapping[str, Any]) -> str | None:
        actions: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
            "hello": lambda _: None,
            "poll": lambda _: None,
            "pick": self._pick,
            "type": self._type,
            "set": self._set,
            "select": self._select,
            "toggle": self._toggle,
            "clear": self._clear,
            "role": self._role,
            "beside": self._beside,
            "match": self._match,
            "load": self._load,
            "step": self._step,
            "restore": self._restore,
            "compare": lambda _: self._become(replace(self.state, compared=True)),
            "undo": lambda _: self._undo(),
            "stop": lambda _: self._worker.stop(),
            "resume": lambda _: self._worker.resume(),
            "save": self._save,
        }
        name = _word(command.get("do"))
        if name not in actions:
            raise InputError(f"no command {name!r}; {nearest(name, actions)}")
        return actions[name](command)

    def _become(self, state: State) -> None:
        self.state = state

    def _index(self, command: Mapping[str, Any]) -> int:
        index, pairs = command.get("index"), self.material.shown.pairs
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(pairs):
            raise InputError(f"there is no pair {_word(index)}; pick one from 0 to {len(pairs) - 1}.")
        return index

    def _pick(self, command: Mapping[str, Any]) -> None:
        index, pairs = self._index(command), self.material.shown.pairs
        position = self.state.position if self.state.position in {"all", "last", *pairs[index].positions} else "all"
        self._become(replace(self.state, pair=pairs[index], picked=index, position=position))

    def _type(self, command: Mapping[str, Any]) -> None:
        pair = typed_pair(command, self.subjects["teacher"].model, self.material.settings)
        for subject in self.subjects.values():
            refuse_large(subject.model, tokens_of(pair, subject.model, self.material.settings), self.memory)
        for subject in self.subjects.values():
            subject.pair(pair)
        known = [text_of(each) for each in self.material.shown.pairs]
        if text_of(pair) in known:
            self._pick({"index": known.index(text_of(pair))})
            return
        position = self.state.position if self.state.position in ("all", "last") else "all"
        self._become(replace(self.state, pair=pair, picked=None, position=position, average=False))

    def _set(self, command: Mapping[str, Any]) -> None:
        known: dict[str, list[Any]] = {
            "method": [each["value"] for each in self._choices()["methods"]],
            "metric": list(METRIC_TITLES),
            "position": self.positions(),
            "outside": list(OUTSIDE_TITLES),
            "average": [True, False],
            "weighted": [True, False],
            "layer": [None, *range(self.subjects[self.state.side].shape[0])],
        }
        changes = {name: value for name, value in command.items() if name != "do"}
        for name, value in changes.items():
            if name not in known:
                raise InputError(f"no setting {_word(name)!r}; {nearest(_word(name), known)}")
            if not any(type(value) is type(each) and value == each for each in known[name]):  # 1 is not true
                raise InputError(f"{name} can't be {_word(value)!r}; {nearest(_word(value), map(str, known[name]))}")
        self._become(replace(self.state, **changes))

    def _choices(self) -> dict[str, Any]:
        return choices(with_mean=self.material.reference is not None)

    def positions(self) -> list[str]:
        """The named positions of the pair in view."""
        return ["all", *dict.fromkeys(["last", *self.state.pair.positions])]

    def _place(self, command: Mapping[str, Any]) -> tuple[Side, Head]:
        side = self._side(command)
        return side, self.subjects[side].model.checked(Head.parse(_word(command.get("head"))))

    def _side(self, command: Mapping[str, Any]) -> Side:
        for side in self.subjects:
            if side == command.get("side"):
                return side
        named = _word(command.get("side"))
        raise InputError(f"there is no model {named!r} here; {nearest(named, self.subjects)}")

    def _select(self, command: Mapping[str, Any]) -> None:
        side, head = self._place(command)
        layer = self.state.layer
        if layer is not None and layer >= self.subjects[side].shape[0]:
            layer = None
        self._become(replace(self.state, side=side, head=head, layer=layer))

    def _beside(self, command: Mapping[str, Any]) -> None:
        """A second head (on the pair in view, or on another pair by its number), or none."""
        if command.get("head") is None:
            self._become(replace(self.state, beside=None))
            return
        side, head = self._place(command)
        pair, picked = self.state.pair, self.state.picked
        if command.get("index") is not None:
            picked = self._index(command)
            pair = self.material.shown.pairs[picked]
        self._become(replace(self.state, beside=Beside(side=side, head=head, pair=pair, picked=picked)))

    def _match(self, command: Mapping[str, Any]) -> str:
        """The next or the previous matched pair: the teacher's head in view, the student's beside it."""
        pairs = [] if self.head_map is None else list(self.head_map.pairs)
        step = command.get("step")
        if not pairs or "student" not in self.subjects:
            raise InputError("no matches are known here; start with --run (a run's folder), or give `head_map=`.")
        if type(step) is not int or step not in (-1, 1):
            raise InputError(f"matched pairs are walked by 1 or -1, not {_word(step)}.")
        at = parts.match_in_view(self.state, pairs) if self.state.side == "teacher" else None
        at = (0 if step > 0 else len(pairs) - 1) if at is None else (at + step) % len(pairs)
        student, teacher = pairs[at]
        other = self.state.beside.side if self.state.beside and self.state.beside.side == "after" else "student"
        self.subjects["teacher"].model.checked(teacher)
        self.subjects[other].model.checked(student)
        beside = Beside(side=other, head=student, pair=self.state.pair, picked=self.state.picked)
        self._become(replace(self.state, side="teacher", head=teacher, layer=None, beside=beside))
        return f"matched pair {at + 1} of {len(pairs)}: {teacher} of the teacher, {student} of the {other}"

    def _role(self, command: Mapping[str, Any]) -> str:
        """Some heads of a circuit into one role by name."""
        side, role, names = self._side(command), command.get("role"), command.get("heads")
        if not isinstance(names, list) or not names:
            raise InputError("a role needs heads: choose some of the circuit.")
        circuit = self.state.circuits[side]
        heads = {self.subjects[side].model.checked(Head.parse(_word(name))) for name in names}
        missing = sorted(heads - set(circuit.heads))
        if missing:
            raise InputError(f"{missing[0]} is not in the {side}'s circuit; add it first.")
        if not _is_role(role):
            raise InputError(
                f"{_word(role)!r} is no name of a role; write up to {LONGEST_ROLE} letters without '+', such as "
                "'value fetcher'."
            )
        after = self.state.with_circuit(side, with_role(circuit, heads, role))
        return self._changed(after, f"called {', '.join(map(str, sorted(heads)))} of the {side} {role!r}")

    def _load(self, command: Mapping[str, Any]) -> str:
        """A circuit of a file, or the ranking of the heat map in view, to step along."""
        side, name = self._side(command), _word(command.get("source"))
        if name == MAP:
            scores = self.scores(side)
            if scores is None:
                raise InputError(f"the {side}'s heat map is not there yet; wait for it.")
            empty = empty_circuit(self.subjects[side].shape)
            ranking = tuple(scores.ranked(by=METHODS[self.state.method].order))
            mine = f"{MAP} ({side})"
            method = f"ranking of the heat map ({METHODS[self.state.method].title})"
            self.sources[mine] = Source(name=mine, circuit=replace(empty, method=method), ranking=ranking)
            name = mine
        if name not in self.sources:
            self._look_for_circuits()
        if name not in self.sources:
            raise InputError(f"there is no circuit {name!r} to load; {nearest(name, [MAP, *self.sources])}")
        source = self.sources[name]
        self._refuse_unfit(side, source.circuit)
        after = self.state.with_circuit(side, source.circuit)
        after = replace(after, paths={**self.state.paths, side: name})
        return self._changed(after, f"loaded {name} as the {side}'s circuit")

    def _step(self, command: Mapping[str, Any]) -> str:
        """So many of the first heads of the ranking that was loaded. A walk of several steps is undone as one."""
        side, size = self._side(command), command.get("size")
        source = self.sources.get(self.state.paths.get(side, ""))
        if source is None or not source.ranking:
            raise InputError(f"no ranking is loaded for the {side}; load a circuit that was found by a search.")
        if type(size) is not int or not 0 <= size <= len(source.ranking):
            raise InputError(f"{_word(size)} heads can't be taken; the ranking has {len(source.ranking)}.")
        circuit = source.first(size)
        for role, heads in self.state.circuits[side].roles.items():  # a name given by hand stays
            named = [head for head in heads if role not in source.circuit.role_of(head).split("+")]
            circuit = with_role(circuit, named, role)
        after, done = self.state.with_circuit(side, circuit), f"stepped along {source.name}"
        if self._past and self._past[-1].done == done:
            self._become(after)
            return done
        return self._changed(after, done)

    def _look_for_circuits(self) -> None:
        made = {name: source for name, source in self.sources.items() if name.startswith(MAP)}
        self.sources = {**sources([*self.runs, self.folder]), **made}

    def link(self) -> dict[str, Any]:
        """What a link says of the view: enough for `restore` in another session on the same models and prompts."""
        state = self.state
        pair = {"index": state.picked} if state.picked is not None else text_of(state.pair)
        beside = state.beside
        return {
            "about": self._about(),
            "pair": pair,
            "select": None if state.head is None else {"side": state.side, "head": str(state.head)},
            "set": {name: getattr(state, name) for name in LINKED},
            "beside": None
            if beside is None or beside.picked is None
            else {"side": beside.side, "head": str(beside.head), "index": beside.picked},
            "circuits": {
                side: [[str(m.head), m.role, m.position] for m in circuit.members]
                for side, circuit in state.circuits.items()
                if circuit.members
            },
        }

    def _about(self) -> str:
        """What a link is valid for, in words that a person can compare."""
        models = [f"{side} {subject.shape[0]}x{subject.shape[1]}" for side, subject in self.subjects.items()]
        return ", ".join([self.material.describe()["title"], *models])

    def _restore(self, command: Mapping[str, Any]) -> str:
        """What a link says, all of it or nothing."""
        view, before, past = command.get("view"), self.state, self._past
        try:
            if not isinstance(view, Mapping):
                raise InputError("it holds no view")
            if view.get("about") != self._about():
                raise InputError(f"it is about {_word(view.get('about'))}, here is {self._about()}")
            self._restore_parts(view)
        except Exception as refused:
            self.state, self._past = before, past
            why = str(refused) if isinstance(refused, InputError) else f"it is damaged ({type(refused).__name__})"
            raise InputError(f"the link's view is not restored: {why.rstrip('.')}. What is in view stays.") from None
        return "the link's view is restored"

    def _restore_parts(self, view: Mapping[str, Any]) -> None:
        pair = _object(view.get("pair"))
        (self._pick if "index" in pair else self._type)(pair)
        circuits: dict[Side, Circuit] = {}
        for side, members in _object(view.get("circuits")).items():
            named, subject = self._side({"side": side}), self.subjects[self._side({"side": side})]
            if not isinstance(members, list) or not all(_is_member(each) for each in members):
                raise InputError("a circuit in it is damaged")
            found = [Member(subject.model.checked(Head.parse(head)), role, place) for head, role, place in members]
            circuits[named] = Circuit.of(found, shape=subject.shape, method="picked by hand")
            self._refuse_places(found)
        if circuits and any(self.state.circuits[side].members != each.members for side, each in circuits.items()):
            after = replace(self.state, circuits={**self.state.circuits, **circuits}, compared=False)
            self._changed(after, "took the circuits of a link")
        if view.get("select") is not None:
            self._select(_object(view["select"]))
        settings = _object(view.get("set"))
        if not set(settings) <= set(LINKED):
            raise InputError("it has settings that are unknown here")
        if settings:
            self._set({"do": "set", **settings})
        self._beside(_object(view.get("beside")))

    def _refuse_places(self, members: Sequence[Member]) -> None:
        known = {"all", "last", *(place for pair in self.material.shown.pairs for place in pair.positions)}
        for member in members:
            if not set(member.position.removeprefix("not ").split("+")) <= known:
                raise InputError(f"it puts {member.head} at {_word(member.position)}, which no prompt has")

    def _toggle(self, command: Mapping[str, Any]) -> str:
        side, head = self._place(command)
        after, done = self.state.toggled(side, head)
        return self._changed(after, done)

    def _clear(self, command: Mapping[str, Any]) -> str:
        side = self._side(command)
        return self._changed(
            self.state.with_circuit(side, empty_circuit(self.subjects[side].shape)), f"emptied the {side}'s circuit"
        )

    def _changed(self, after: State, done: str) -> str:
        self._past = [*self._past, Change(circuits=self.state.circuits, done=done)][-UNDOS:]
        self._become(after)
        return done

    def _undo(self) -> str:
        if not self._past:
            raise InputError("there is nothing to undo.")
        last = self._past.pop()
        self._become(replace(self.state, circuits=last.circuits, compared=False))
        return f"undone: {last.done}"

    def _save(self, command: Mapping[str, Any]) -> str:
        """Only a plain file name in the session's folder, never over anything but a circuit, and over another circuit
        only where `overwrite` says so."""
        side, name = self._side({"side": command.get("side", self.state.side)}), command.get("name")
        if not _is_plain_name(name):
            raise InputError(
                f"{_word(name)!r} is no plain file name; write for example circuit.json (it goes to "
                f"{self.folder.resolve()})."
            )
        path = self.folder / (name if name.endswith(".json") else f"{name}.json")
        if path.exists() and not path.is_file():
            raise InputError(f"{path.name} is there already and is no file; choose another name.")
        circuit, there = self.state.circuits[side], None
        if path.exists():
            try:
                there = Circuit.from_json(storage.read_json(path))
            except (InputError, AttributeError, TypeError):
                raise InputError(f"{path.name} is there already and holds no circuit; choose another name.") from None
        if not circuit.heads:
            raise InputError(f"the {side}'s circuit is empty; add a head to it before you save it.")
        if there is not None and there != circuit and command.get("overwrite") is not True:
            held = f"{len(there.heads)} head{'' if len(there.heads) == 1 else 's'}"
            raise Exists(f"{path.name} holds another circuit ({held}); overwrite it, or choose another name.")
        storage.write_json(path, circuit.to_json())
        self._look_for_circuits()
        return f"saved the {side}'s circuit to {path.resolve()}"

    def setup(self) -> dict[str, Any]:
        """What does not change in a session: models, prompts, choices, colours."""
        models = [
            {
                "side": side,
                "name": subject.model.name,
                "layers": subject.shape[0],
                "heads": subject.shape[1],
                "kv_heads": subject.model.n_kv_heads,
            }
            for side, subject in self.subjects.items()
        ]
        return {"models": models, "material": self.material.describe(), **self._choices(), "colours": colours()}

    def view(self) -> dict[str, Any]:
        """Everything on the page, of what is known now."""
        pending, stopped = (
            self._worker.pending(),
            self._worker.stopped(),
        )  # first: what is done meanwhile is asked for once more, never missed
        shown = parts.shown(self.state, self.subjects, self._worker.outcome, self.head_map, self.sources)
        state = self.state
        return plain(
            {
                **shown,
                "pair": {**text_of(state.pair), "picked": state.picked},
                "settings": {
                    "method": state.method,
                    "metric": state.metric,
                    "position": state.position,
                    "acts": state.acts,
                    "average": state.average,
                    "outside": state.outside,
                    "weighted": state.weighted,
                    "positions": self.positions(),
                    "compared": state.compared,
                    "layer": state.layer,
                },
                "sources": {
                    side: [
                        MAP,
                        *(
                            name
                            for name, each in self.sources.items()
                            if each.circuit.shape == subject.shape and not name.startswith(MAP)
                        ),
                    ]
                    for side, subject in self.subjects.items()
                },
                "link": self.link(),
                "selected": {"side": state.side, "head": state.head},
                "undo": self._past[-1].done if self._past else None,
                "code": script.python_lines(state, self.subjects[state.side]),
                "pending": pending,
                "stopped": stopped,
            }
        )

    def do(self, name: str, **fields: Any) -> dict[str, Any]:
        """Carry out a command and wait for all that it asks for: the complete view (for Python; the page polls).

        Errors: `InputError` with what the page would be told.
        """
        view = self.handle({"do": name, **fields})
        if view["error"] is not None:
            raise InputError(view["error"])
        return self.settle()

    def settle(self, seconds: float = 600.0) -> dict[str, Any]:
        """Wait until everything in view is there, and return the view (for scripts and tests; the page polls)."""
        return self.handle({"do": "poll"}, patience=seconds)

    def scores(self, side: Side = "teacher") -> Scores | None:
        """The heat map in view as `Scores`; None while it is being computed."""
        outcome, estimated = parts.map_scores(self.state, self.subjects[side], self._worker.outcome)
        return outcome.value if outcome and estimated is None else None

    def close(self) -> None:
        """Stop computing."""
        self._worker.close()


def _word(value: Any) -> str:
    """What stands where a word belongs, short enough to be said again."""
    return f"{value!s:.100}" if isinstance(value, str | bool | int | float | None) else type(value).__name__


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_member(value: Any) -> TypeGuard[list[str]]:
    """[head, role, position] of a link."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(each, str) and 0 < len(each) <= LONGEST_NAME and each.isprintable() for each in value)
    )


def _is_role(name: Any) -> TypeGuard[str]:
    return (
        isinstance(name, str)
        and 0 < len(name.strip()) <= len(name) <= LONGEST_ROLE
        and (name.isprintable() and "+" not in name)
    )


def _is_plain_name(name: Any) -> TypeGuard[str]:
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= LONGEST_NAME
        and name.isprintable()
        and not name.startswith(".")
        and not any(sign in name for sign in "/\\:")
    )
