"""The roles of a recipe's heads by their names: explained once, and in place of their letters where there is room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from workbench.circuits.circuit import Circuit
from workbench.report.page import Section
from workbench.values.scores import Scores

INPUTS = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The stages of a search, each of which gives the heads that it finds a role."""

    stages: Sequence[Mapping[str, Any]]
    """As a recipe has them: name, title, position, into, composition."""

    @property
    def names(self) -> dict[str, str]:
        """Letter -> name."""
        return {stage["name"]: stage["title"] for stage in self.stages}

    def renamed(self, circuit: Circuit) -> Circuit:
        """The circuit with names as roles; a role of no stage stays."""
        members = (replace(member, role=self.names.get(member.role, member.role)) for member in circuit.members)
        return replace(circuit, members=tuple(sorted(set(members))))

    def relabelled(self, looks: Scores) -> Scores:
        """Attention of members, `L0H1 (A) at last` -> `L0H1 value fetcher, at last`."""
        members = [self._label(label) for label in looks.labels["member"]]
        return replace(looks, labels={**looks.labels, "member": tuple(members)})

    def _label(self, label: str) -> str:
        head, _, rest = label.partition(" (")
        role, closed, place = rest.partition(") ")
        return f"{head} {self.names.get(role, role)}, {place.replace('_', ' ')}" if closed else label

    def key(self, circuits: Mapping[str, Circuit]) -> str:
        """`A value fetcher, B position transmitter`: the roles of these circuits."""
        there = {role for circuit in circuits.values() for role in circuit.roles}
        return ", ".join(f"{letter} {name}" for letter, name in self.names.items() if letter in there)

    def section(self, circuits: Mapping[str, Circuit]) -> Section | None:
        """A table of the roles with their heads; None where no circuit has any of them."""
        there = [stage for stage in self.stages if any(stage["name"] in each.roles for each in circuits.values())]
        if not there:
            return None
        heads = "".join(
            f'<th scope="col">{escape(name)}</th>' for name in ("Role", "Letter", "Acts at", "Feeds", *circuits)
        )
        rows = "\n".join(self._row(stage, circuits) for stage in there)
        text = (
            "What a head does, by the place where it acts and what it feeds. A head may have several roles; small "
            "figures say a role by its letter."
        )
        table = f'<table class="words">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
        return Section(heading="The roles of the heads", text=text, html=table)

    def _row(self, stage: Mapping[str, Any], circuits: Mapping[str, Circuit]) -> str:
        into = stage.get("into")
        feeds = (
            "the logits"
            if into is None
            else f"the {INPUTS.get(stage['composition'], '')} of a {self.names.get(into, into)}"
        )
        members = [" ".join(map(str, circuit.roles.get(stage["name"], ()))) or "none" for circuit in circuits.values()]
        cells = (stage["name"], stage["position"].replace("_", " "), feeds, *members)
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        return f'<tr><th scope="row">{escape(stage["title"])}</th>{row}</tr>'
