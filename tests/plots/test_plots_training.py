"""Loss curves, over steps and over seeds."""

import numpy as np
import pytest
from scipy import stats

from tests.plots.plot_results import everything, log_of, result_of, seeded_logs, traces
from workbench.errors import InputError
from workbench.plots.export import to_frame
from workbench.plots.losses import loss_curves
from workbench.plots.seeds import loss_bands, seeds_chart


class TestTraining:
    """Loss curves."""

    def test_raw_losses_are_all_there_in_their_panels(self) -> None:
        task, alignment = np.random.default_rng(0).random(50).tolist(), np.random.default_rng(1).random(50).tolist()
        figure = loss_curves(
            {
                "circuit_ce_cka": log_of(task, alignment),
                "full_ce": log_of(task[:20], None),
                "circuit_cka": log_of(None, alignment),
            }
        )
        raw = {(trace.name, trace.yaxis): trace for trace in traces(figure, meta="step")}
        assert set(raw) == {
            ("circuit / CE + CKA", "y"),
            ("circuit / CE + CKA", "y2"),
            ("full / CE", "y"),
            ("circuit / CKA", "y2"),
        }
        assert raw["circuit / CE + CKA", "y"].y.tolist() == task
        assert raw["circuit / CE + CKA", "y2"].y.tolist() == alignment
        assert raw["full / CE", "y"].x.tolist() == list(range(20))

    def test_the_bold_line_is_the_centred_mean(self) -> None:
        values = np.random.default_rng(0).random(31)
        (bold,) = traces(loss_curves({"full_ce": log_of(values.tolist(), None)}, smoothing=5), meta="mean")
        slow = [float(np.mean([values[step + shift] for shift in range(-2, 3)])) for step in range(2, 29)]
        assert bold.x.tolist() == list(range(2, 29))
        assert bold.y == pytest.approx(slow)

    @pytest.mark.parametrize(("steps", "smoothing"), [(50, 1), (8, 5)])
    def test_no_smoothing_where_none_is_asked_or_fits(self, steps: int, smoothing: int) -> None:
        figure = loss_curves({"full_ce": log_of([1.0] * steps, None)}, smoothing=smoothing)
        assert not traces(figure, meta="mean")
        assert traces(figure, meta="step")[0].showlegend
        assert "Bold" not in figure.layout.title.text

    def test_units_legend_and_seeds(self) -> None:
        losses = log_of([1.0] * 40, [2.0] * 40)
        figure = loss_curves({"circuit_ce_cka-0": losses, "circuit_ce_cka-1": losses, "my run": losses})
        assert figure.layout.yaxis.title.text == "task loss (nats)"
        assert figure.layout.yaxis2.title.text == "sum over pairs of (1 - CKA)"
        assert [trace.name for trace in figure.data if trace.showlegend] == ["circuit / CE + CKA", "my run"]
        assert {trace.line.color for trace in traces(figure, legendgroup="circuit_ce_cka")} == {
            traces(figure, legendgroup="circuit_ce_cka")[0].line.color
        }
        assert "seed 1" in traces(figure, legendgroup="circuit_ce_cka")[-1].hovertemplate

    def test_a_condition_has_one_colour_in_every_figure(self) -> None:
        losses = log_of([1.0] * 3, None)
        both = loss_curves({"full_ce": losses, "circuit_ce": losses})
        alone = loss_curves({"circuit_ce": losses})
        assert traces(both, legendgroup="circuit_ce")[0].line == traces(alone, legendgroup="circuit_ce")[0].line
        assert len({trace.line.color for trace in both.data if trace.legendgroup}) == 2

    def test_an_empty_panel_says_so_and_nothing_is_refused(self) -> None:
        assert "no run here has an alignment loss" in everything(loss_curves({"full_ce": log_of([1.0, 0.5], None)}))
        with pytest.raises(InputError, match="at least one run"):
            loss_curves({"full_ce": []})
        with pytest.raises(InputError, match="odd"):
            loss_curves({"full_ce": log_of([1.0], None)}, smoothing=4)


class TestOverSeeds:
    """Means and intervals over seeds."""

    def test_bands_are_t_intervals_of_the_smoothed_seeds(self) -> None:
        figure = loss_bands(seeded_logs(), smoothing=5)
        frame = to_frame(figure)
        runs = [np.array([report.task_loss for report in seeded_logs()[f"circuit_ce_cka-{seed}"]]) for seed in range(2)]
        step = 17
        smooth = [run[step - 2 : step + 3].mean() for run in runs]
        low, high = stats.t.interval(0.95, 1, loc=np.mean(smooth), scale=stats.sem(smooth))
        (row,) = frame.query("condition == 'circuit_ce_cka' and term == 'task_loss' and step == @step").to_dict(
            "records"
        )
        assert (row["mean"], row["low"], row["high"]) == (
            pytest.approx(np.mean(smooth)),
            pytest.approx(low),
            pytest.approx(high),
        )
        assert row["seeds"] == 2

    def test_a_single_seed_has_a_line_and_no_band(self) -> None:
        figure = loss_bands(seeded_logs())
        assert not traces(figure, name="circuit_ce: interval")
        assert len(traces(figure, name="circuit / CE (1 seed)")) == 1
        assert len(traces(figure, name="circuit_ce_cka: interval")) == 2  # a panel for each loss term
        assert "One seed, so no band: circuit / CE." in figure.layout.title.text.replace("<br>", " ")

    def test_dots_are_means_over_seeds_with_t_intervals(self) -> None:
        values = [0.5, 0.6, 0.75]
        figure = seeds_chart(
            [
                *(result_of("full_ce", seed=seed, full=value) for seed, value in enumerate(values)),
                result_of("teacher", full=0.9),
            ]
        )
        (full,) = traces(figure, name="full model")
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert full.x[0] == pytest.approx(np.mean(values))
        assert (full.x[0] - full.error_x.arrayminus[0], full.x[0] + full.error_x.array[0]) == (
            pytest.approx(low),
            pytest.approx(high),
        )
        assert (full.x[1], full.error_x.array[1]) == (0.9, 0)
        assert list(traces(figure, name="full model: seeds")[0].x) == [*values, 0.9]
        with pytest.raises(InputError, match="no results"):
            seeds_chart([])
