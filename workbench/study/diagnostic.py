"""Will alignment help these two models? Their matched pairs' CKA before training, against what a study of many
trainings gained from such starts.

The start of a training is the mean over its aligned pairs of CKA minus its shuffled floor, on discovery prompts, in the
untrained student. A study holds such starts with the gain of alignment over circuit CE in full accuracy; the forecast
reads its trainings with matched partners alone, for random ones are what nobody asks about. It is that of the nearest
starts: their mean gain, its interval, and how many of them gained. It says what happened there, with those models and
that task; it is no law: it rests on a study of the same task, and where starts and gains hardly went together in that
study, or all began alike, it says so and forecasts nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from workbench import storage
from workbench.errors import InputError
from workbench.experiment import located
from workbench.experiment.conditions import CONDITIONS
from workbench.study.grid import Starting
from workbench.study.written import read_summary
from workbench.values.statistics import Estimate, mean_interval, rank_correlation

BUNDLED: Mapping[str, str] = {
    "entity_tracking": "assets/results/study_entity",
    "theory_of_mind": "assets/results/study_mind_whole",
}
"""Task -> the study of it that comes with the project."""
TELLS = 0.5
"""Rank correlation of gain and start from which a study can forecast."""
NEAREST = 5
"""Least number of trainings that a forecast rests on; else a fifth of them, and all that are as near."""
CLEAR = 0.8
"""Share of the nearest trainings that must have gained (or lost) for a forecast."""
Verdict = Literal["likely to help", "undecided", "likely to hurt", "not to be told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A training of a study with matched partners: where its pairs began, and what alignment gained."""

    above_floor: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the nearest trainings of a study say of a start."""

    above_floor: float
    """Mean CKA of the matched pairs minus its floor."""
    cka: float
    floor: float
    pairs: int
    trainings: int
    """Of the study, with matched partners."""
    rank_correlation: float | None
    """Of gain and start over these trainings; None where all began, or gained, alike."""
    nearest: tuple[Start, ...]
    gain: Estimate
    """Mean gain of the nearest with its interval over them, which takes trainings of one start (other seeds) for
    independent."""
    gained: int
    verdict: Verdict
    beyond: bool
    """The start lies outside those of the study."""
    study_task: str | None = None
    """The study's task; None where it does not say."""
    task: str | None = None
    """The run's."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "gain": self.gain.to_json()}

    def text(self) -> str:
        """Two sentences with all figures."""
        low, high = self.nearest[0].above_floor, self.nearest[-1].above_floor
        spread = (
            "" if self.gain.low is None or self.gain.high is None else f" [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        )
        known = (
            ""
            if self.rank_correlation is None
            else f" (rank correlation of gain and start {self.rank_correlation:.2f})"
        )
        outside = " This start lies outside the study's, so read it with care." if self.beyond else ""
        return (
            self._of_another_task() + f"{self._words()}: the {self.pairs} matched pairs' CKA is {self.cka:.2f}, "
            f"{self.above_floor:.2f} above its floor of {self.floor:.2f}. "
            f"Of {self.trainings} trainings of the study with matched partners{known}, the {len(self.nearest)} that "
            f"began nearest ({low:.2f} to {high:.2f} above) gained "
            f"{self.gain.mean:+.3f}{spread} in accuracy over training without alignment; {self.gained} of them gained "
            f"at all; they had {len({round(each.above_floor, 6) for each in self.nearest})} different starts.{outside}"
        )

    def _words(self) -> str:
        if self.verdict != "not to be told":
            return f"alignment is {self.verdict}"
        why = (
            "all began, or gained, alike" if self.rank_correlation is None else "gains and starts hardly went together"
        )
        return f"whether alignment will help is not to be told, for in the study {why}"

    def _of_another_task(self) -> str:
        if self.study_task == self.task:
            return ""
        known = "does not say its task" if self.study_task is None else f"is of {self.study_task}"
        return f"the study {known}, and this run is of {self.task}: read what follows with care. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a study knows of gains and starts."""

    starts: Sequence[Start]
    task: str | None = None

    @property
    def rank_correlation(self) -> float | None:
        """Of gain and start over its trainings (Spearman); None where all began, or gained, alike."""
        return rank_correlation([each.above_floor for each in self.starts], [each.gain for each in self.starts])


def read_known(study: str | Path) -> Known:
    """The starts and gains of a study's trainings with matched partners, from its `summary.json`. Errors: `InputError`
    when there is none."""
    file = Path(located(str(study))) / "summary.json"
    if not file.exists():
        raise InputError(f"{study} holds no summary of a study; give the folder of a finished `workbench study`.")
    summary = read_summary(file)
    starts = [
        Start(above_floor=point["cka"] - point["floor"], gain=point["gain"])
        for point in summary["diagnostic"]["points"]
        if CONDITIONS[point["condition"]].aligns == "matched"
    ]
    bundled = {folder: task for task, folder in BUNDLED.items()}
    return Known(starts=starts, task=summary.get("task") or bundled.get(str(study)))


def forecast(ckas: Sequence[Mapping[str, Any]], known: Known, *, task: str | None = None) -> Forecast | None:
    """The forecast for matched pairs (rows of `ckas.json`: cka, floor) of a run of a task; None without pairs or
    without trainings."""
    starts, rank_correlation = known.starts, known.rank_correlation
    if not ckas or not starts:
        return None
    cka, floor = (sum(row[name] for row in ckas) / len(ckas) for name in ("cka", "floor"))
    start = cka - floor
    count = min(len(starts), max(NEAREST, len(starts) // 5))
    reach = sorted(abs(each.above_floor - start) for each in starts)[count - 1]
    nearest = sorted(
        (each for each in starts if abs(each.above_floor - start) <= reach + 1e-9), key=lambda each: each.above_floor
    )
    gained = sum(each.gain > 0 for each in nearest)
    lost = sum(each.gain < 0 for each in nearest)
    all_starts = [each.above_floor for each in starts]
    verdict: Verdict = (
        "not to be told"
        if rank_correlation is None or rank_correlation < TELLS
        else "likely to help"
        if gained >= CLEAR * len(nearest)
        else "likely to hurt"
        if lost >= CLEAR * len(nearest)
        else "undecided"
    )
    return Forecast(
        above_floor=start,
        cka=cka,
        floor=floor,
        pairs=len(ckas),
        trainings=len(starts),
        rank_correlation=rank_correlation,
        nearest=tuple(nearest),
        gain=mean_interval([each.gain for each in nearest]),
        gained=gained,
        verdict=verdict,
        beyond=not min(all_starts) <= start <= max(all_starts),
        study_task=known.task,
        task=task,
    )


def forecast_of(run: Path, study: str | Path | None = None, *, task: str | None) -> Forecast | None:
    """The forecast for a run folder that `workbench match` has written, of a task; also kept there as `forecast.json`.

    `study`: the folder of one; None for the bundled one of the same task. None without pairs, and where no study of the
    task is at hand.
    """
    study = study or BUNDLED.get(task or "")
    if study is None or (study in BUNDLED.values() and not (Path(located(str(study))) / "summary.json").exists()):
        return None
    ckas = storage.read_typed(storage.read_json(run / "ckas.json"), list[Starting], what=f"CKAs of pairs ({run})")
    expectation = forecast(ckas, read_known(study), task=task)
    if expectation is not None:
        storage.write_json(run / "forecast.json", expectation.to_json())
    return expectation
