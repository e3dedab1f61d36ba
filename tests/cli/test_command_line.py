"""The command line itself: quick where nothing is computed, one line with a remedy where something can't be had, quiet
where nobody watches."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from workbench import __version__
from workbench.cli import endings, main
from workbench.cli.parser import parser
from workbench.errors import InputError
from workbench.experiment.recipe import bundled_recipes
from workbench.models.devices import require_device
from workbench.patching import progress
from workbench.storage import write_json, write_tensors

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "pandas", "numpy", "plotly", "scipy")
SECONDS = 1.5
"""Of processor time, where about 0.3 are taken; importing torch alone takes 3 on the same machine."""


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def measured(*words: str) -> tuple[int, float, list[str], str]:
    """A command in a process of its own: exit code, processor seconds, heavy packages that it loaded, its output."""
    code = (
        "import json, sys\nfrom workbench.cli import main\n"
        f"try:\n    code = main({list(words)!r})\nexcept SystemExit as ended:\n    code = int(ended.code or 0)\n"
        f"print('\\n' + json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    exit_code, heavy = json.loads(done.stdout.splitlines()[-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return exit_code, seconds, heavy, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "COMMAND"),
        (["--version"], 0, __version__),
        ([], 0, "workbench check-model MODEL"),
        (["distill", "--help"], 0, "circuit_ce_cka"),
        (["recipes"], 0, "study_entity"),
        (["demo", "--recipe", "demoo"], 2, "did you mean 'demo'?"),
        (["demo", "--recipe", "no/such.yaml"], 2, "neither a file nor a bundled recipe"),
        (["demo", "--set", "training.stepz=3"], 2, "did you mean 'steps'"),
        (["demo", "--set", "training.steps=many"], 2, "training.steps"),
        (["study", "--set", "studentss={}"], 2, "did you mean 'students'"),
        (["plan", "demo", "--set", "teachr=x"], 2, "did you mean 'teacher'"),
        (["finetune", "--recipe", "smollm2_boxes_teacher", "--out", "x", "--set", "stepz=3"], 2, "'steps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_computes_nothing_is_answered_at_once(words: list[str], code: int, said: str) -> None:
    found, seconds, heavy, output = measured(*words)
    assert (found, heavy) == (code, [])
    assert said in output
    assert "Traceback" not in output
    assert seconds <= SECONDS


def test_the_measurement_would_notice_torch() -> None:
    _, seconds, heavy, output = measured("check-task", "no_such_task")
    assert "torch" in heavy
    assert "no task 'no_such_task'" in output
    assert seconds > 0


def test_a_command_or_option_that_is_not_there_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, nearest in ((["demmo"], "'demo'"), (["check-modl", "x"], "'check-model'"), (["plann", "x"], "'plan'")):
        assert run(*words) == 2
        assert f"did you mean {nearest}" in capsys.readouterr().err
    assert run("demo", "--reciepe", "x") == 2
    assert "workbench demo does not take '--reciepe'; did you mean '--recipe'" in capsys.readouterr().err


def test_both_modules_are_the_command() -> None:
    for name in ("workbench", "workbench.cli"):
        done = subprocess.run([sys.executable, "-m", name, "--version"], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split() == ["workbench", __version__], done.stderr


def test_all_bundled_recipes_are_listed_with_their_title_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    files = {path.stem for path in (ROOT / "workbench/recipes").glob("*/*.yaml") if path.parent.name != "accelerate"}
    assert {each.name for each in bundled_recipes()} == files
    place = [printed.index(f"{kind}  (workbench") for kind in ("run", "study", "finetuning")]
    assert place == sorted(place)
    for each in bundled_recipes():
        assert f"  {each.name} " in printed
        assert each.title in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in parser().get_default("known"))
    assert "--log-file" in script or "log-file" in script


def test_completion_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 2
    assert "[completion]" in capsys.readouterr().err


def commands(*, taking: str) -> set[str]:
    return {name for name, each in parser().get_default("known").items() if taking in each.format_help()}


def test_every_command_that_loads_a_model_takes_a_device_and_a_dtype() -> None:
    loading = {"demo", "discover", "match", "distill", "evaluate", "study", "explore", "check-model", "finetune"}
    loading.add("generate")
    assert commands(taking="--device") == commands(taking="--dtype") == loading
    assert commands(taking="--quiet") == commands(taking="--log-file") == set(parser().get_default("known"))


@pytest.mark.parametrize("device", ["cuda:99", "tpuu", "cuda:-2", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["demo", "--out", "run"], ["study", "--out", "study"], ["explore"], ["check-model", "no/model/here"]):
        assert run(*words, "--device", device) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert repr(device) in message
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_devices_that_are_there() -> None:
    require_device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no device 'cuda'"):
            require_device("cuda")


def test_the_device_and_dtype_of_the_command_line_are_the_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Callable[..., Path]
) -> None:
    value = {
        "teacher": str(model_folder("llama", seed=1)),
        "data": {"options": {"boxes": 3}, "reference_scenes": 2, "discovery_scenes": 2, "test_scenes": 2},
        "discovery": {"heads": 1, "least_effect": 0.0, "confidence": 0.01},
        "evaluation": {"curve": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(value))
    words = ["discover", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run"]
    assert run(*words, "--dtype", "bfloat16", "--device", "cpu", "--quiet", "--log-file", tmp_path / "log/all.txt") == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no progress bar into a pipe"
    assert captured.out == "", "quiet"
    logged = (tmp_path / "log/all.txt").read_text()
    assert "report" in logged
    assert logged.startswith("20"), "with the time"
    assert json.loads((tmp_path / "run/run.json").read_text())["recipe"]["dtype"] == "bfloat16"
    assert not logging.getLogger("workbench").handlers


def test_progress_bars_are_drawn_where_somebody_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**settings: Any) -> bool:
        with progress.progress_bar(total=2, **settings) as bar:
            return not bar.disable

    class Terminal:
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None: ...

    assert not drawn(), "pytest's standard error is no terminal"
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert drawn()
    assert not drawn(shown=False)
    with progress.watched(lambda share: None):
        assert not drawn()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not drawn()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "nothing can be written"), (errno.EACCES, "permissions")],
)
def test_a_file_that_cant_be_written_is_one_line_with_file_and_remedy(code: int, remedy: str) -> None:
    line = endings.explained(OSError(code, os.strerror(code), "runs/x/run.json"))
    assert line is not None
    assert line.startswith(f"runs/x/run.json: {os.strerror(code)}; ")
    assert remedy in line
    assert endings.explained(OSError("the hub\nsays no")) == "the hub says no"
    assert endings.explained(KeyError("a bug")) is None


def test_places_that_are_no_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Callable[..., Path]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"teacher": str(model_folder("llama", seed=1))}))
    (tmp_path / "folder.yaml").mkdir()
    below = ["discover", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "file/run"]
    for words, named in (
        (below, "file/run"),
        (["discover", "--recipe", tmp_path / "folder.yaml", "--out", tmp_path / "run"], "folder.yaml can't be read"),
        (["recipes", "--log-file", tmp_path / "folder.yaml"], "folder.yaml: Is a directory"),
        (["recipes", "--log-file", tmp_path / "file/log.txt"], "file: "),
    ):
        assert run(*words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert named in message
    with pytest.raises((OSError, InputError), match="file"):
        run(*below, "--debug")


@pytest.mark.parametrize("write", ["write_json", "write_tensors"])
def test_what_could_not_be_written_is_named_itself_not_its_temporary_file(write: str, tmp_path: Path) -> None:
    """In a process whose files may have 2000 bytes, as on a full disk: the file is named, and nothing is left over."""
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom workbench import storage\n"
        "from workbench.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "value = {'a': 'b' * 9000} if sys.argv[1] == 'write_json' else {'a': torch.zeros(9000)}\n"
        "try:\n    getattr(storage, sys.argv[1])(Path('whole.file'), value)\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, write],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith(f"whole.file can't be written ({os.strerror(errno.EFBIG)}); "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_writers_write_where_there_is_room(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    write_tensors(tmp_path / "b.safetensors", {"a": torch.zeros(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.safetensors"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["demo", "--out", "x"], "interrupted; the same command with --resume goes on from here"),
        (["demo", "--out", "x", "--resume"], "interrupted; the same command goes on from here"),
        (["finetune", "--recipe", "a", "--out", "b"], "interrupted; the same command goes on from its last checkpoint"),
        (["pretrain"], "interrupted; the same command goes on from its last checkpoint"),
        (["plan", "demo"], "interrupted"),
        (["check-model", "teacher"], "interrupted"),
    ],
)
def test_what_goes_on_after_an_interruption(words: list[str], advice: str) -> None:
    assert endings.interrupted(parser().parse_args(words)) == advice


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.lengthy), signal.SIGTERM])
def test_signals_end_a_command_with_its_advice(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", "explore", "--prompts", "4"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    assert "the explorer is at" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "ended" in out
    assert "Traceback" not in error


def test_a_pipe_that_is_closed_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m workbench completion bash | head -c 10; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""
