"""The trials of a study spread over processes of this machine or a Ray cluster, to the same files as one process writes
after another.

A trial is one training (and its evaluation), or one search for a circuit anew: a function of the study's configuration,
the student, the data size, the condition, the seed and lambda, which writes into a folder of its own. So trials need no
order among each other but two: lambda is chosen before a cell's conditions run, and a circuit is found anew in a
student that has been trained. The driver finds circuits and head maps first, which all trials read; what is evaluated
once (the teacher) it does at the end. Where every process computes with as many threads, the numbers are the sequential
study's to the bit.

On Ray the study's folder (and `$WORKBENCH_CACHE`) must be on a file system that all machines see. A trial whose worker
dies is begun again on another, from its last checkpoint; when that fails again and again, the study stops and resumes
with `--resume`.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workbench.errors import InputError
from workbench.experiment.pool import Pool, peak_memory
from workbench.models.sources import require_package
from workbench.study.choice import Point
from workbench.study.grid import Study, opened_study

log = logging.getLogger("workbench")
RETRIES = 3
"""How often a trial is begun again when its worker dies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training of a study, or one search for a circuit in what was trained."""

    student: str
    scenes: int
    condition: str
    seed: int
    at: Point | None = None
    """lambda and learning rate on trial, judged on validation prompts; None: the chosen ones, evaluated on the test
    prompts."""
    anew: bool = False
    """Not a training: the circuit is found anew in the trained student."""

    def __str__(self) -> str:
        what = self.at.folder if self.at is not None else "circuit anew" if self.anew else "trained"
        return f"{self.student}, {self.scenes} scenes, {self.condition}, seed {self.seed}, {what}"


def choices(study: Study) -> Iterator[Trial]:
    """The trainings that lambda and learning rates are chosen by and that don't wait for others, of cells where they
    are not chosen yet."""
    config = study.config
    for scenes in config.train_scenes:
        for student in config.students:
            if not study.weight_file(student, scenes).exists():
                for point in study.points(student, scenes):
                    yield from (
                        Trial(student=student, scenes=scenes, condition=point.condition, seed=seed, at=point)
                        for seed in config.validation_seeds
                    )


def arms(study: Study) -> Iterator[Trial]:
    """All conditions and seeds of all cells that have no result yet."""
    for scenes in study.config.train_scenes:
        for student in study.config.students:
            folder = replace(study.folder(student), trial=f"scenes-{scenes}")
            for condition, seed in study.arms(student, scenes):
                if not (folder.condition(condition, seed) / "result.json").exists():
                    yield Trial(student=student, scenes=scenes, condition=condition, seed=seed)


def searches(study: Study) -> Iterator[Trial]:
    """The circuits that are to be found anew and have not been."""
    scenes, seed = study.config.train_scenes[0], study.config.seeds[0]
    for student in study.config.students:
        for condition in study.config.anew:
            if not study.anew_file(student, scenes, condition).exists():
                yield Trial(student=student, scenes=scenes, condition=condition, seed=seed, anew=True)


def run_trial(path: Path, trial: Trial) -> None:
    """Do one trial of the study in a folder, whose circuits and head maps are there."""
    study = _study_in(path)
    if trial.anew:
        study.find_anew(trial.student, trial.scenes, trial.condition)
    else:
        study.run_trial(trial.student, trial.scenes, trial.condition, trial.seed, at=trial.at)


def search(path: Path, student: str, model: str) -> None:
    """Find the circuit of one model of one student's run, in the study in a folder."""
    _study_in(path).search(student, model)


@functools.lru_cache(maxsize=1)
def _study_in(path: Path) -> Study:
    """The study as this process knows it: its models are loaded, and its prompts made, once for all trials."""
    return opened_study(path)


def run_in_waves(study: Study, run_all: Callable[[Sequence[Trial]], None]) -> None:
    """The trials that don't wait for each other at once, the next ones when those are done; then what is left."""
    run_all(list(choices(study)))
    if study.config.learning_rates:
        run_all(list(choices(study)))  # the conditions with alignment, at the lambda that can be told now
    for wave in (arms, searches):
        study.choose()
        run_all(list(wave(study)))
    study.run()


def run_in_processes(study: Study, workers: int) -> None:
    """`study.run()` with its trials on so many processes of this machine, one thread each; they share the recipe's
    accelerator, if it computes on one.

    Errors: as `Pool.run`; a study that stops resumes.
    """
    path = study.path.resolve()
    searching = Pool(workers=workers, unit="model", what="circuits", need=peak_memory(), device=study.recipe.device)
    searching.run(search, [(path, *each) for each in study.unsearched()])
    study.prepare()
    pool = Pool(
        workers=workers, unit="trial", what="trials of the study", need=peak_memory(), device=study.recipe.device
    )

    def run_all(trials: Sequence[Trial]) -> None:
        pool.run(run_trial, [(path, trial) for trial in trials], lambda number, _: log.info("%s: done", trials[number]))

    with pool:
        run_in_waves(study, run_all)


def run_on_ray(study: Study, *, workers: int | None = None) -> None:
    """`study.run()` with its trials on a Ray cluster (`$RAY_ADDRESS`), or on `workers` processes of this machine.

    Errors: `InputError` without Ray, and when trials fail.
    """
    require_package("ray", "ray")
    threads = torch.get_num_threads()
    study.prepare()
    with _Cluster(workers, threads, accelerated=study.recipe.device != "cpu") as cluster:
        run_in_waves(study, functools.partial(cluster.run, study.path))


class _Cluster:
    """A connection to Ray for the length of a context."""

    def __init__(self, workers: int | None, threads: int, *, accelerated: bool) -> None:
        self.workers, self.threads, self.accelerated = workers, threads, accelerated

    def __enter__(self) -> "_Cluster":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray  # pyright: ignore[reportMissingImports]

        passed = {name: os.environ[name] for name in ("WORKBENCH_CACHE", "HF_HUB_OFFLINE") if name in os.environ}
        settings: dict[str, Any] = {
            "runtime_env": {"env_vars": {**passed, "OMP_NUM_THREADS": str(self.threads)}},
            "log_to_driver": False,
        }
        if not os.environ.get("RAY_ADDRESS"):
            settings |= {
                "include_dashboard": False,
                "num_cpus": None if self.workers is None else self.workers * self.threads,
            }
        ray.init(**settings)
        return self

    def __exit__(self, *_: object) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        ray.shutdown()

    def run(self, path: Path, trials: Sequence[Trial]) -> None:
        """All of them; a failed one does not keep the others from finishing."""
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

        remote: Any = ray.remote(num_cpus=self.threads, num_gpus=int(self.accelerated), max_retries=RETRIES)
        work, where = remote(_remote), str(Path.cwd())
        waiting: Any = {work.remote(str(path.resolve()), trial, self.threads, where): trial for trial in trials}
        failed = []
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            trial = waiting.pop(done)
            try:
                ray.get(done)
                log.info("%s: done, %d left", trial, len(waiting))
            except RayError as error:
                failed.append(f"{trial}: {str(error).strip().splitlines()[-1]}")
        if failed:
            raise InputError(
                f"{len(failed)} of {len(trials)} trials failed, the others are kept; go on with --resume. First: "
                f"{failed[0]}"
            )


def _remote(path: str, trial: Trial, threads: int, where: str) -> None:
    """In a worker's process, from the driver's directory, which relative paths of a recipe start at."""
    os.chdir(where)
    torch.set_num_threads(threads)
    run_trial(Path(path), trial)
