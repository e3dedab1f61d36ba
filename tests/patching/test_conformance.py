"""`workbench check-model` on miniatures of the families it should know, with random weights; the rest is refused with
the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import FAMILIES, SUPPORTED, WINDOW, miniature

from workbench.cli import main
from workbench.errors import InputError
from workbench.patching import conformance
from workbench.patching.conformance import Check, Conformance, check_model
from workbench.patching.path import PathPatcher


def by_paths(found: Conformance) -> list[Check]:
    """The checks of path patching, without those of ablation and of activation patching."""
    others = ("ablating all heads", "patching what enters")
    return [check for check in found.checks if not check.what.startswith(others)]


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_known_family_passes_and_is_fast(family, tmp_path):
    found = check_model(miniature(family, SUPPORTED[family], tmp_path / family))
    assert found.passed, found.text()
    assert not found.precision
    assert found.engine == "replay"
    assert len(found.checks) == 8
    assert all(ability.possible for ability in found.abilities), found.text()
    assert all(check.effect > 100 * check.difference for check in found.checks)


@pytest.mark.parametrize("family", ["Mistral", "Phi3"])
def test_a_sliding_window_is_exact_through_hooks(family, tmp_path):
    """The replay knows no windows: it notices that it does not agree, and leaves the patching to hooked forwards."""
    found = check_model(miniature(family, WINDOW, tmp_path / family))
    assert found.passed, found.text()
    assert found.engine == "hooks"


def test_what_the_replay_does_not_take_is_answered_by_hooks_and_says_so_once(tmp_path, caplog):
    """Bloom's MLP is given the residual stream beside what it reads: the replay's probe raised."""
    found = check_model(miniature("Bloom", FAMILIES["Bloom"], tmp_path))
    assert found.passed, found.text()
    assert found.engine == "hooks"
    said = [record.getMessage() for record in caplog.records if "hooked forwards" in record.getMessage()]
    assert len(said) == 1, "once for a model, however many batches and methods"
    assert "more than the replay knows (TypeError" in said[0]


@pytest.mark.parametrize("spread", [0.02, 2e-4])
def test_an_untrained_model_is_no_fault(spread, tmp_path, capsys):
    """Its q and k paths have no effect to compare; a path that has a small one counts."""
    folder = miniature("GPT2", SUPPORTED["GPT2"], tmp_path, initializer_range=spread)
    found = check_model(folder)
    verdicts = [check.verdict for check in found.checks]
    assert verdicts[0] == "ok"
    assert {"ok", "inconclusive"} == set(verdicts)
    assert not found.wrong
    assert main(["check-model", str(folder)]) == 0
    assert "inconclusive is no fault" in capsys.readouterr().out


def test_a_wrong_engine_is_seen_at_the_smallest_effect_that_counts(tmp_path, monkeypatch):
    """On a default-initialised model, whose paths change the logits by some 1e-3: paths that do nothing are not ok."""
    folder = miniature("GPT2", SUPPORTED["GPT2"], tmp_path, initializer_range=0.02)
    monkeypatch.setattr(PathPatcher, "logits", lambda self, *given, **named: self.clean_logits)
    found = check_model(folder)
    assert not any(check.passed for check in by_paths(found))
    assert len(found.wrong) >= 4


@pytest.mark.parametrize(("dtype", "apart"), [("bfloat16", 1e-3), ("float16", 1e-4)])
def test_half_precision_is_judged_in_float32_and_its_loss_is_said(dtype, apart):
    found = check_model("assets/models/teacher", dtype=dtype)
    assert found.passed, found.text()
    assert f"judged in float32: in {dtype} the same logits" in found.text()
    said = float(found.precision.split("come out up to ")[1].split()[0])
    assert apart < said < 100 * apart


def test_float64_is_judged_in_float64(tmp_path):
    found = check_model(miniature("GPT2", SUPPORTED["GPT2"], tmp_path), dtype="float64")
    assert found.passed, found.text()
    assert all(check.difference < 1e-12 for check in by_paths(found))


def test_with_norms_after_attention_each_method_says_what_it_can_do(tmp_path):
    found = check_model(miniature("Gemma2", FAMILIES["Gemma2"], tmp_path))
    assert found.passed, found.text()
    assert found.engine == "replay"
    assert "norms after attention" in found.shape
    refused = {ability.method: ability.how for ability in found.abilities if not ability.possible}
    assert set(refused) == {"logit attribution", "edge attribution", "circuits of edges"}
    assert "do not sum to its logits" in refused["logit attribution"]
    assert f"logit attribution: no; {refused['logit attribution']}" in found.text()


def test_a_family_without_attention_is_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match="its blocks have no attention with heads; choose a model"):
        check_model(miniature("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, tmp_path))


def test_the_command_says_what_is_supported(model_folder: Callable[..., Path], capsys):
    """Of several, and of all before the first that is refused is an error."""
    assert main(["check-model", "./no-such-model", str(model_folder("neox"))]) == 2
    shown, error = capsys.readouterr()
    assert "./no-such-model: refused, ./no-such-model is not a directory" in shown
    assert "1 of 2 models are not supported exactly; see above. First: ./no-such-model is not" in error
    assert "parallel blocks" in shown
    assert "replay, exact and fast" in shown
    assert shown.count("  ok: ") == 8
    assert "ablation: replay, exact and fast" in shown


def test_a_model_that_is_patched_wrongly_fails(model_folder: Callable[..., Path], monkeypatch, capsys):
    """The checks have teeth: an engine that is off by a thousandth of the effect is caught."""
    right = PathPatcher.logits
    monkeypatch.setattr(PathPatcher, "logits", lambda self, *given, **named: right(self, *given, **named) + 1e-3)
    found = conformance.check_model(model_folder("llama"))
    assert {check.verdict for check in by_paths(found)} == {"WRONG"}
    assert main(["check-model", str(model_folder("llama"))]) == 2
    assert "not supported exactly" in capsys.readouterr().err
