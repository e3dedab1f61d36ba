"""The front door: names that are there, quick and lazy; errors that say what to do."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench import plots

ROOT = Path(__file__).parents[2]


def type_checked_names(package: str) -> set[str]:
    """What a type checker and an editor see: the names imported under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize(("package", "module"), [("workbench", wb), ("workbench/plots", plots)])
def test_all_the_lazy_table_and_the_types_name_the_same(package: str, module: Any) -> None:
    assert set(module.__all__) == set(module._HOMES) == type_checked_names(package)
    assert list(module.__all__) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize(("module", "package"), [(wb, "workbench"), (plots, "workbench/plots")])
def test_a_lazy_name_is_what_the_types_say(module: Any, package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module
        for alias in node.names:
            home = __import__(node.module, fromlist=[alias.name])
            assert getattr(module, alias.asname or alias.name) is getattr(home, alias.name)


def in_a_fresh_python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_the_package_alone_is_quick_and_brings_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import time; start = time.process_time(); import workbench; seconds = time.process_time() - start\n"
        "heavy = {'torch', 'plotly', 'pandas', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert 'find_circuit' in dir(workbench) and workbench.InputError and not heavy, heavy\n"
        "print(seconds)"
    )
    assert float(in_a_fresh_python(code, tmp_path)) < 0.1


@pytest.mark.parametrize("asked", ["", "ACTIVE"])
def test_threads_that_wait_sleep_unless_told_otherwise(asked: str, tmp_path: Path) -> None:
    """The policy is read when torch is loaded, so it has to stand there before."""
    code = (
        f"import os; os.environ.pop('OMP_WAIT_POLICY', None); asked = {asked!r}\n"
        "if asked: os.environ['OMP_WAIT_POLICY'] = asked\n"
        "import workbench; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    assert in_a_fresh_python(code, tmp_path).strip() == (asked or "PASSIVE")


def test_figures_come_without_being_imported_and_keep_their_names(tmp_path: Path) -> None:
    code = (
        "import workbench as wb; assert 'plotly' not in sys.modules\n"
        "plots = wb.plots; assert 'plotly' not in sys.modules\n"
        "figures = [getattr(plots, name) for name in plots.__all__]\n"
        "assert all(callable(figure) or name.isupper() for name, figure in zip(plots.__all__, figures))\n"
        "assert [getattr(plots, name) for name in plots.__all__] == figures; print('ok')"
    )
    assert in_a_fresh_python(code, tmp_path).strip() == "ok"


@pytest.mark.parametrize(("module", "wrong", "near"), [(wb, "find_circut", "find_circuit"), (plots, "head", "heads")])
def test_an_unknown_name_names_the_nearest(module: Any, wrong: str, near: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did you mean .*'{near}'"):
        getattr(module, wrong)
