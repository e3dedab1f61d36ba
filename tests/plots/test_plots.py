"""One theme for all; every figure renders to a picture that is not blank, and gives its numbers back as a table."""

import ast
import colorsys
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly import graph_objects as go
from plotly import io as plotly_io

from tests.plots.plot_results import CURVE, attribution, counted, everything, figures, head_map, lens, patterns, results
from workbench import plots
from workbench.errors import InputError
from workbench.plots import export
from workbench.plots.export import browser, save_figure, to_frame
from workbench.plots.theme import DARK, HELPS, HURTS, LIGHT, Theme


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of `#rrggbb`."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_can_be_read_on_the_background(theme: Theme) -> None:
    assert contrast(theme.ink, theme.background) > 10
    assert contrast(theme.muted, theme.background) > 4.5
    assert contrast(theme.strong_ink, theme.wash[-1]) > 4.5
    assert min(contrast(colour, theme.background) for colour in theme.categories) > 2
    assert (theme.wash[0], theme.wash[-1]) == (theme.background, theme.diverging[0])


def test_the_theme_is_an_argument() -> None:
    for name, figure in figures(DARK).items():
        assert figure.layout.template.layout.paper_bgcolor == DARK.background, name
        assert LIGHT.background not in everything(figure).replace('"#ffffff"]', ""), name
        assert LIGHT.ink not in everything(figure), name


def test_every_figure_fits_a_notebook_and_says_what_it_shows() -> None:
    for name, figure in figures().items():
        assert 500 <= figure.layout.width <= 900, name
        lines = figure.layout.title.text.split("<br>")
        assert len(lines) > 1, f"{name} has no remark"
        axes = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
        assert any(axes) or name.startswith(("attention", "matching", "circuit")), f"{name} has no axis title"


def test_no_plot_touches_a_model_a_file_or_the_screen() -> None:
    for file in Path(next(iter(plots.__path__))).glob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"workbench.models.hooked_model", "workbench.models.hooks", "workbench.seeds"}, file
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & {"show", "write_image", "write_html", "manual_seed"}, file


class TestTables:
    """`to_frame` of any figure."""

    def test_every_figure_gives_its_numbers_back_also_after_json(self) -> None:
        for name, figure in figures().items():
            frame = to_frame(figure)
            assert len(frame) > 0, name
            again = to_frame(plotly_io.from_json(everything(figure)))
            assert (
                again.astype(object).where(again.notna(), None).equals(frame.astype(object).where(frame.notna(), None))
            ), name

    def test_the_numbers_are_the_results(self) -> None:
        drawn = figures()
        assert to_frame(drawn["attribution"])["mean"].tolist() == attribution().to_frame()["mean"].tolist()
        assert to_frame(drawn["attention maps"])["weight"].tolist() == patterns().to_frame()["weight"].tolist()
        assert to_frame(drawn["lens"])["answer_probability"].tolist() == pytest.approx(
            lens().of_answer.flatten().tolist()
        )
        assert to_frame(drawn["operations"])["accuracy"].tolist() == list(counted().accuracy)
        assert to_frame(drawn["faithfulness"])["faithfulness"].tolist() == list(CURVE.faithfulness)
        assert to_frame(drawn["results"])["full_accuracy"].sum() == pytest.approx(
            sum(row.full_accuracy for row in results())
        )
        change = to_frame(drawn["matching change"])
        assert (
            list(zip(change["student"], change["teacher"], strict=True))
            == [(str(a), str(b)) for a, b in head_map().pairs] * 2
        )
        assert change["when"].tolist() == ["before"] * 3 + ["after"] * 3
        assert to_frame(drawn["heads"])["mean"].isna().sum() == 4 + 2  # the last layers were not measured

    def test_a_strange_figure_is_refused(self) -> None:
        with pytest.raises(InputError, match="carries no table"):
            to_frame(go.Figure())


class TestExport:
    """Pictures."""

    def test_another_ending_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="png, svg, pdf"):
            save_figure(go.Figure(), tmp_path / "a.jpeg")

    def test_without_a_browser_the_remedy_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export, "browser", lambda: None)
        with pytest.raises(InputError, match="apt-get install -y chromium"):
            save_figure(go.Figure(), tmp_path / "a.png")
        monkeypatch.setattr(export, "find_spec", lambda _: None)
        with pytest.raises(InputError, match=r"pip install \"circuit-distillation-workbench\[figures\]\""):
            save_figure(go.Figure(), tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_png_svg_and_pdf_are_written(self, tmp_path: Path) -> None:
        _needs_browser()
        figure = figures()["operations"]
        starts = {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}
        for form, start in starts.items():
            assert save_figure(figure, tmp_path / f"a.{form}").read_bytes().startswith(start), form
        assert "Accuracy by number of operations" in (tmp_path / "a.svg").read_text()


def _needs_browser() -> None:
    if browser() is None or find_spec("kaleido") is None:
        pytest.skip("no Chromium or no kaleido to render with: apt-get install -y chromium")


@pytest.fixture(scope="module")
def render() -> Iterator[Callable[[go.Figure, str], bytes]]:
    """Figure and format -> bytes, all by one browser."""
    _needs_browser()
    import kaleido

    kaleido.start_sync_server(path=browser(), n=1, silence_warnings=True)
    yield lambda figure, form: kaleido.calc_fig_sync(figure, opts={"format": form, "scale": 1})
    kaleido.stop_sync_server(silence_warnings=True)


def pixels(png: bytes) -> torch.Tensor:
    """[height width 3] of a PNG, as 0 to 255."""
    import io

    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).int()


def ink_share(png: bytes, theme: Theme) -> float:
    """Share of the pixels that are clearly not background."""
    background = torch.tensor([int(theme.background[at : at + 2], 16) for at in (1, 3, 5)])
    return float(((pixels(png) - background).abs().amax(-1) > 24).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    "theme", [pytest.param(LIGHT, id="light"), pytest.param(DARK, id="dark", marks=pytest.mark.lengthy)]
)
def test_rendered_pictures_are_not_blank(render: Callable[[go.Figure, str], bytes], theme: Theme) -> None:
    blank = go.Figure(
        layout={
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "plot_bgcolor": theme.background,
            "paper_bgcolor": theme.background,
        }
    )
    assert ink_share(render(blank, "png"), theme) == 0
    for name, figure in figures(theme).items():
        picture = render(figure, "png")
        assert picture.startswith(b"\x89PNG"), name
        assert 0.01 < ink_share(picture, theme) < 0.7, name
        quarters = [part for half in pixels(picture).chunk(2, 0) for part in half.chunk(2, 1)]
        assert min(len(quarter.flatten(0, 1).unique(dim=0)) for quarter in quarters[:1] + quarters[2:3]) > 5, (
            f"{name} is empty on its left"
        )


@pytest.mark.slow
def test_rendered_pictures_hold_their_words(render: Callable[[go.Figure, str], bytes]) -> None:
    """An SVG keeps its text: title, and the labels that each kind of figure must show."""
    wanted = {
        "heads": ["teacher", "student", "layer"],
        "matching change": ["before training", "after training", "L1H3 · A"],
        "loss bands": ["task loss (nats)"],
        "attention maps": ["L0H1", "w3"],
        "attention text": ["w69", "L2H2"],
        "circuit": ["2.1", "logits", "last"],
        "attribution": ["MLP", "final biases"],
        "lens": ["answer", "L1"],
        "CKA": ["teacher head", "L2H1"],
        "impacts": ["equal impact"],
        "CKA change": ["before training", "after training", "L2H1"],
        "convergence": ["circuit / CE", "optimizer step"],
        "operations": ["operations in the prompt"],
        "looks": ["token looked at", "L0H1 (A) at last"],
        "study": ["full / CE", "accuracy on held-out test prompts"],
        "seeds": ["full / CE"],
        "results": ["circuit alone"],
        "faithfulness": ["CPR"],
        "lens curves": ["depth"],
        "losses": ["optimizer step"],
        "matching": ["L0H1 · C"],
    }
    drawn = figures()
    assert set(wanted) == set(drawn)
    for name, figure in drawn.items():
        words = " ".join(re.findall(r">([^<>]+)<", render(figure, "svg").decode()))
        title = re.sub("<.*?>", "", figure.layout.title.text.split("<br>")[0])
        for word in [title, *wanted[name]]:
            assert word in words, f"{name} does not show {word!r}"


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_what_helps_has_one_colour_and_its_name(theme: Theme) -> None:
    """Orange hues from zero up, blue ones below, zero as the background, as the words everywhere say."""
    hues = {"orange": (15, 45), "blue": (195, 225)}
    middle = len(theme.diverging) // 2
    assert theme.diverging[middle] == theme.background
    for word, colours in ((HURTS, theme.diverging[:middle]), (HELPS, theme.diverging[middle + 1 :])):
        for colour in colours:
            red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
            assert hues[word][0] <= 360 * colorsys.rgb_to_hsv(red, green, blue)[0] <= hues[word][1], colour
    assert {theme.helps, theme.hurts} <= set(theme.diverging)
