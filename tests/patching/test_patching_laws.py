"""Laws and limits of patching, ablation and circuits on random models, and what they refuse.

The independent side of "predicted = measured" is a plain `transformers` model with torch hooks on its attention output
projections.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.circuits.circuit import Circuit, Member, random_circuit, whole_model
from workbench.circuits.discovery import DiscoveryConfig, backward_search
from workbench.circuits.evaluation import circuit_logits, evaluate_circuit
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Student, Teacher
from workbench.models.sources import quiet
from workbench.patching.ablation import ablated_logits, ablation_edits, ablation_profiles, plain_logits, reference_means
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher, activation_baselines, path_patch, prepared, sweep_heads
from workbench.tasks.base import PromptPairs, Stage
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.metrics import METRICS, log_probability
from workbench.values.refs import Embedding, Head, Mlp, Receiver

ROUNDING = 2e-5
"""Largest difference of logits (of scale 1 to 5, in float32) that is put down to the order of additions."""


class Plain:
    """A `transformers` model whose heads' outputs (inputs of the output projection) can be read and changed."""

    def __init__(self, folder: Path) -> None:
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.n_heads = self.model.config.num_attention_heads
        kind = self.model.config.model_type
        if kind == "llama":
            self.projections = [block.self_attn.o_proj for block in self.model.model.layers]
            self.final_norm = self.model.model.norm
        elif kind == "gpt2":
            self.projections = [block.attn.c_proj for block in self.model.transformer.h]
            self.final_norm = self.model.transformer.ln_f
        else:
            self.projections = [block.attention.dense for block in self.model.gpt_neox.layers]
            self.final_norm = self.model.gpt_neox.final_layer_norm

    @torch.no_grad()
    def run(
        self, tokens: Tensor, change: Callable[[int, Tensor], Tensor] = lambda layer, z: z
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Final logits, z of every layer [batch pos head d_head] before the change, and the residual stream before the
        last norm."""
        seen: list[Tensor] = []
        residual: list[Tensor] = []

        def on(layer: int) -> Callable[..., Any]:
            def hook(module: Any, inputs: Any) -> tuple[Tensor]:
                z = inputs[0].unflatten(-1, (self.n_heads, -1))
                seen.append(z)
                return (change(layer, z.clone()).flatten(2).contiguous(),)

            return hook

        handles = [projection.register_forward_pre_hook(on(layer)) for layer, projection in enumerate(self.projections)]
        handles.append(self.final_norm.register_forward_pre_hook(lambda module, inputs: residual.append(inputs[0])))
        try:
            logits = self.model(tokens, use_cache=False).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen, residual[0]

    @torch.no_grad()
    def written(self, layer: int, z: Tensor) -> Tensor:
        """What z [batch pos head d_head] adds to the residual stream, without the bias."""
        projection = self.projections[layer]
        bias = 0 if projection.bias is None else projection.bias
        return projection(z.flatten(2)) - bias

    @torch.no_grad()
    def unembedded(self, residual: Tensor) -> Tensor:
        """Logits of a final residual stream, at the last token."""
        return self.model.get_output_embeddings()(self.final_norm(residual))[:, -1]


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def folder(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Path:
    """A random model of each architecture: grouped-query attention, learned positions, parallel blocks."""
    return model_folder(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Teacher:
    return Teacher.load(folder)


@pytest.fixture(scope="module")
def llama(model_folder: Callable[..., Path]) -> Teacher:
    """For what does not depend on the architecture."""
    return Teacher.load(model_folder("llama"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return entity_pairs(split="test", scenes=2)


@pytest.fixture(scope="module")
def calibration() -> PromptPairs:
    return entity_pairs(split="calibration", scenes=4)


@pytest.fixture(scope="module")
def patcher(model: Teacher, pairs: PromptPairs) -> PathPatcher:
    return PathPatcher(model, pairs)


def putting(head: Head, value: Tensor, where: Tensor) -> Callable[[int, Tensor], Tensor]:
    """A change of z: a head takes its value [batch pos head d_head] where `where` [batch pos] is True."""

    def change(layer: int, z: Tensor) -> Tensor:
        if layer == head.layer:
            z[:, :, head.index] = torch.where(where[..., None], value[:, :, head.index], z[:, :, head.index])
        return z

    return change


def mean_by_hand(z: Tensor, per_position: bool) -> Tensor:
    """Mean of z [prompt pos head d_head] over prompts, or over prompts and positions."""
    return z.mean(0) if per_position else z.flatten(0, 1).mean(0)


def replace_rows(pairs: PromptPairs, other: PromptPairs, count: int) -> PromptPairs:
    """The pairs with their first clean prompts taken from the other ones."""
    return replace(pairs, clean=torch.cat([other.clean[:count], pairs.clean[count:]]))


def until(pairs: PromptPairs, position: str) -> PromptPairs:
    """The prompts cut off after a position that all of them have at the same token; it becomes their last one."""
    end = int(pairs.position(position).nonzero()[0, 1]) + 1
    positions = {name: where[:, :end] for name, where in pairs.positions.items()}
    return replace(
        pairs,
        clean=pairs.clean[:, :end],
        corrupt=pairs.corrupt[:, :end],
        mask=pairs.mask[:, :end],
        positions={**positions, "last": positions[position]},
    )


def everything(model: HookedModel) -> list[Embedding | Head | Mlp]:
    return [Embedding(), *model.heads, *(Mlp(layer) for layer in range(model.n_layers))]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def assert_far(found: Tensor, other: Tensor) -> None:
    """Every prompt's logits differ by at least 100 roundings."""
    assert float((found - other).abs().amax(-1).min()) >= 100 * ROUNDING


@pytest.mark.parametrize("composition", [None, "q", "k", "v"])
def test_patching_a_prompt_with_itself_changes_nothing(model, pairs, patcher, composition):
    receivers = [Receiver(Head(2, 1), composition)] if composition else []
    same = PathPatcher(model, replace(pairs, corrupt=pairs.clean))
    for freeze_mlps in (False, True):
        assert_equal(same.logits(everything(model), receivers=receivers, freeze_mlps=freeze_mlps), same.clean_logits)
        assert_far(patcher.logits(everything(model), receivers=receivers, freeze_mlps=freeze_mlps), same.clean_logits)


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_patching_everything_gives_the_corrupt_run_and_less_does_not(model, pairs, freeze_mlps):
    """The prompts end at the query label, where the clean and the corrupt token differ, so that the embedding counts
    too."""
    short = until(pairs, "query_label")
    patcher = PathPatcher(model, short)
    assert_far(patcher.corrupt_logits, patcher.clean_logits)
    assert_equal(patcher.logits(everything(model), freeze_mlps=freeze_mlps), patcher.corrupt_logits)
    assert_equal(
        PathPatcher(model, short.swapped()).logits(everything(model), freeze_mlps=freeze_mlps), patcher.clean_logits
    )
    for left_out in (Embedding(), Head(0, 2)):
        assert_far(
            patcher.logits([sender for sender in everything(model) if sender != left_out], freeze_mlps=freeze_mlps),
            patcher.corrupt_logits,
        )
    without_mlp = patcher.logits([sender for sender in everything(model) if sender != Mlp(1)], freeze_mlps=freeze_mlps)
    (assert_far if freeze_mlps else assert_equal)(
        without_mlp, patcher.corrupt_logits
    )  # a live MLP reads corrupt inputs by itself


def test_patching_no_sender_changes_nothing(patcher):
    for freeze_mlps in (False, True):
        assert_equal(patcher.logits([], freeze_mlps=freeze_mlps), patcher.clean_logits)
        assert_equal(
            patcher.logits([], receivers=[Receiver(Head(2, 0), "v")], freeze_mlps=freeze_mlps), patcher.clean_logits
        )


def test_the_direct_effect_passes_through_the_last_token_only(model, patcher):
    assert_equal(patcher.logits(model.heads, "last"), patcher.logits(model.heads, "all"))
    assert_equal(patcher.logits(model.heads, "query_label"), patcher.clean_logits)
    assert_far(patcher.logits(model.heads, "last"), patcher.clean_logits)


def test_all_senders_into_all_inputs_of_all_heads_are_all_heads_patched(model, patcher):
    """With every q, k and v at its corrupt value, every head's output is corrupt, whatever the embedding."""
    receivers = [Receiver(head, composition) for head in model.heads for composition in ("q", "k", "v")]
    found = patcher.logits(everything(model), receivers=receivers)
    assert_equal(found, patcher.logits(model.heads))
    assert_far(found, patcher.clean_logits)


def test_heads_at_or_above_the_receivers_have_no_path_to_them(model, pairs, patcher):
    receivers = [Receiver(Head(1, 0), "q"), Receiver(Head(1, 3), "v")]
    scores = path_patch(model, pairs, metric="log_probability", receivers=receivers)
    measured = ~scores.values.isnan()
    assert measured[0].all()
    assert not measured[1:].any()
    above = [head for head in model.heads if head.layer >= 1]
    assert_equal(patcher.logits(above, receivers=receivers), patcher.clean_logits)
    assert_far(patcher.logits([Head(0, head) for head in range(4)], receivers=receivers), patcher.clean_logits)


def test_a_key_or_value_receiver_is_its_whole_group(model, patcher):
    senders = [Head(0, index) for index in range(4)]
    for composition in ("q", "k", "v"):
        first, second, last = (
            patcher.logits(senders, receivers=[Receiver(Head(2, index), composition)]) for index in (0, 1, 3)
        )
        assert_far(first, last)
        if composition != "q" and model.n_kv_heads < model.n_heads:
            assert torch.equal(first, second)
        else:
            assert_far(first, second)


def test_the_direct_effect_with_frozen_mlps_is_the_change_put_through_the_last_norm_by_hand(
    model, plain, pairs, patcher
):
    clean, clean_z, residual = plain.run(pairs.clean)
    _, corrupt_z, _ = plain.run(pairs.corrupt)
    for head in model.heads:
        change = torch.zeros_like(clean_z[head.layer])
        change[:, :, head.index] = (corrupt_z[head.layer] - clean_z[head.layer])[:, :, head.index]
        predicted = plain.unembedded(residual + plain.written(head.layer, change))
        assert_equal(patcher.logits([head], freeze_mlps=True), predicted)
        assert_far(predicted, clean)


def test_the_score_of_a_last_layer_head_is_what_a_plain_intervention_measures(model, plain, pairs):
    """No head lies above the last layer, so its path effect is its whole effect."""
    metric = METRICS["log_probability"]
    clean, _, _ = plain.run(pairs.clean)
    _, corrupt_z, _ = plain.run(pairs.corrupt)
    before = metric(clean, pairs.answers, pairs.distractors)
    scores = path_patch(model, pairs, metric=metric)
    assert not scores.values.isnan().any()
    assert scores.baseline == pytest.approx(float(before.mean()), abs=ROUNDING)
    for head in (head for head in model.heads if head.layer == model.n_layers - 1):
        patched, _, _ = plain.run(pairs.clean, putting(head, corrupt_z[head.layer], pairs.position("last")))
        effect = before - metric(patched, pairs.answers, pairs.distractors)
        torch.testing.assert_close(scores.at(head), effect, rtol=0, atol=ROUNDING * float(before.abs().max()))
        assert float(effect.abs().max()) >= 100 * ROUNDING * float(before.abs().max())


def test_scores_do_not_depend_on_the_batch(llama, pairs):
    receivers = [Receiver(Head(1, 0), "v")]
    whole, parts = (
        path_patch(llama, pairs, metric="log_probability", receivers=receivers, execution=Execution(batch=batch))
        for batch in (128, 4)
    )
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=ROUNDING, equal_nan=True)
    assert parts.baseline == pytest.approx(whole.baseline)


def test_a_batch_without_a_gap_is_measured_all_the_same_when_another_has_one(llama, pairs):
    """The gap is a matter of all prompts: here the second batch's pairs are equal, so its effects are 0."""
    half = replace(pairs, corrupt=torch.cat([pairs.corrupt[:3], pairs.clean[3:]]))
    scores = path_patch(
        llama, half, metric="log_probability", receivers=[Receiver(Head(1, 0), "v")], execution=Execution(batch=3)
    )
    assert float(scores.values[0, :, 3:].abs().max()) <= ROUNDING
    assert float(scores.values[0, :, :3].abs().mean(-1).max()) >= 100 * ROUNDING


def test_a_relative_effect_is_the_difference_over_the_clean_value(llama, pairs):
    metric = METRICS["probability"]
    clean = metric(plain_logits(llama, pairs), pairs.answers, pairs.distractors)
    route = Route(position="last", receivers=(Receiver(Head(1, 0), "q"),))
    difference, relative = (
        sweep_heads(prepared(llama, pairs), route, metric="probability", effect=effect)
        for effect in ("difference", "relative")
    )
    torch.testing.assert_close(relative.values, difference.values / clean, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_two_ends_are_the_clean_and_the_corrupt_run_on_the_same_answers(model, plain, pairs):
    expected = [
        float(log_probability(plain.run(tokens)[0], pairs.answers, pairs.distractors).mean())
        for tokens in (pairs.clean, pairs.corrupt)
    ]
    assert activation_baselines(prepared(model, pairs), "log_probability") == pytest.approx(expected, abs=ROUNDING)


def test_ablating_nothing_changes_nothing(model, pairs, calibration):
    means = reference_means(model, calibration)
    for value in (means, "zero"):
        assert torch.equal(ablated_logits(model, pairs, {}, value), plain_logits(model, pairs))
        assert torch.equal(ablated_logits(model, pairs, {Head(1, 1): ()}, value), plain_logits(model, pairs))


def test_the_whole_model_as_a_circuit_is_the_model(model, pairs, calibration):
    circuit = whole_model((model.n_layers, model.n_heads))
    for scope in ("positions", "everywhere"):
        assert torch.equal(
            circuit_logits(model, pairs, circuit, reference_means(model, calibration), scope=scope),
            plain_logits(model, pairs),
        )


@pytest.mark.parametrize("per_position", [False, True])
def test_the_empty_circuit_is_every_head_ablated(model, plain, pairs, calibration, per_position):
    empty = Circuit.of([], shape=(model.n_layers, model.n_heads), method="nothing")
    means = reference_means(model, calibration, per_position=per_position)
    found = circuit_logits(model, pairs, empty, means)
    assert_equal(found, ablated_logits(model, pairs, dict.fromkeys(model.heads, ("all",)), means))
    _, reference_z, _ = plain.run(calibration.clean)
    by_hand, _, _ = plain.run(pairs.clean, lambda layer, z: mean_by_hand(reference_z[layer], per_position).expand_as(z))
    assert_equal(found, by_hand)
    assert_far(found, plain_logits(model, pairs))


@pytest.mark.parametrize("per_position", [False, True])
def test_mean_ablation_of_a_head_is_the_mean_by_hand_put_in_by_hand(model, plain, pairs, calibration, per_position):
    means = reference_means(model, calibration, per_position=per_position, batch=5)
    _, reference_z, _ = plain.run(calibration.clean)
    for head, position in ((Head(0, 2), "all"), (Head(1, 3), "last"), (Head(1, 0), "objects")):
        value = mean_by_hand(reference_z[head.layer], per_position).expand(*pairs.clean.shape, -1, -1)
        by_hand, _, _ = plain.run(pairs.clean, putting(head, value, pairs.position(position)))
        assert_equal(ablated_logits(model, pairs, {head: (position,)}, means, batch=4), by_hand)
        assert_far(by_hand, plain_logits(model, pairs))


def test_an_ablation_profile_holds_what_plain_interventions_measure(model, plain, pairs):
    profiles = ablation_profiles(model, pairs, "zero", metrics=["log_probability", "accuracy"])
    before = log_probability(plain.run(pairs.clean)[0], pairs.answers, pairs.distractors)
    for head in model.heads:
        zero = torch.zeros(*pairs.clean.shape, model.n_heads, model.d_head)
        impact = before - log_probability(
            plain.run(pairs.clean, putting(head, zero, pairs.position("all")))[0], pairs.answers, pairs.distractors
        )
        torch.testing.assert_close(profiles["log_probability"].at(head), impact, rtol=0, atol=ROUNDING)
        assert float(impact.abs().max()) >= 100 * ROUNDING
    assert profiles["log_probability"].baseline == pytest.approx(float(before.mean()), abs=ROUNDING)


def test_heads_that_were_not_asked_for_are_not_measured(llama, pairs):
    scores = ablation_profiles(llama, pairs, "zero", metrics="log_probability", heads=[Head(1, 2)])["log_probability"]
    assert scores.ranked() == [Head(1, 2)]


def test_an_ablation_at_a_position_leaves_earlier_positions_untouched(model, pairs, calibration):
    means = reference_means(model, calibration)
    names = [hooks.residual_post(layer) for layer in range(model.n_layers)]
    _, before = model.activations(pairs.clean, pairs.mask, names)
    with hooks.edit(
        model.model, ablation_edits(model, pairs, {Head(0, 1): ("query_label",), Head(1, 2): ("query_label",)}, means)
    ):
        _, after = model.activations(pairs.clean, pairs.mask, names)
    start = int(pairs.position("query_label").nonzero()[0, 1])
    for name in names:
        assert torch.equal(after[name][:, :start], before[name][:, :start])
        assert_far(after[name][:, start], before[name][:, start])
    assert_far(after[names[-1]][:, start + 1 :].flatten(1), before[names[-1]][:, start + 1 :].flatten(1))


def test_keeping_a_circuit_at_its_positions_ablates_it_elsewhere(model, plain, pairs, calibration):
    """By hand: one head is live at the last token, all else is at the mean."""
    circuit = Circuit.of([Member(Head(2, 1), "A", "last")], shape=(model.n_layers, model.n_heads), method="one head")
    means = reference_means(model, calibration)
    _, reference_z, _ = plain.run(calibration.clean)

    def change(layer: int, z: Tensor) -> Tensor:
        ablated = mean_by_hand(reference_z[layer], per_position=True).expand_as(z).clone()
        if layer == 2:
            ablated[:, -1, 1] = z[:, -1, 1]
        return ablated

    assert_equal(circuit_logits(model, pairs, circuit, means), plain.run(pairs.clean, change)[0])
    assert_far(
        circuit_logits(model, pairs, circuit, means),
        circuit_logits(model, pairs, circuit.without(circuit.heads), means),
    )


def test_a_report_of_the_whole_model_and_of_nothing(llama, pairs, calibration):
    means = reference_means(llama, calibration)
    circuit = whole_model((llama.n_layers, llama.n_heads))
    report = evaluate_circuit(
        llama, replace(pairs, answers=plain_logits(llama, pairs).argmax(-1)), circuit, means, random_circuits=2
    )
    assert (report.full_accuracy, report.circuit_accuracy, report.faithfulness) == (1.0, 1.0, 1.0)
    nothing = evaluate_circuit(
        llama, replace(pairs, answers=plain_logits(llama, pairs).argmax(-1)), circuit.without(llama.heads), means
    )
    assert nothing.heads == 0
    assert nothing.circuit_accuracy == nothing.empty_accuracy == nothing.random_circuit_accuracy


def test_a_random_circuit_has_the_roles_and_none_of_the_heads():
    circuit = Circuit.of(
        [Member(Head(0, 1), "D", "earlier_label"), Member(Head(2, 2), "A", "last"), Member(Head(2, 2), "B", "last")],
        shape=(3, 4),
        method="by hand",
    )
    draws = [random_circuit(circuit, seed=0, draw=draw) for draw in range(20)]
    for draw in draws:
        assert len(draw.heads) == 2
        assert not set(draw.heads) & set(circuit.heads)
        assert sorted((m.role, m.position) for m in draw.members) == sorted(
            (m.role, m.position) for m in circuit.members
        )
    assert len({draw.heads for draw in draws}) > 10
    assert draws[3] == random_circuit(circuit, seed=0, draw=3)


def test_reference_prompts_among_the_evaluated_ones_are_refused(llama, pairs, calibration):
    means = reference_means(llama, replace_rows(calibration, pairs, 2))
    circuit = whole_model((llama.n_layers, llama.n_heads))
    for attempt in (
        lambda: ablated_logits(llama, pairs, {Head(0, 0): ("all",)}, means),
        lambda: ablation_profiles(llama, pairs, means, metrics="log_probability"),
        lambda: evaluate_circuit(llama, pairs, circuit, means),
    ):
        with pytest.raises(InputError, match=r"2 of the 6 evaluated prompts are also reference prompts.*another split"):
            attempt()


def test_training_mode_is_refused_at_every_door(folder, pairs, calibration):
    student = Student.load(folder, check=False)
    patcher, means = PathPatcher(student, pairs), reference_means(student, calibration)
    doors = [
        lambda: PathPatcher(student, pairs),
        lambda: patcher.logits([Head(0, 0)]),
        lambda: path_patch(student, pairs, metric="log_probability"),
        lambda: reference_means(student, calibration),
        lambda: plain_logits(student, pairs),
        lambda: ablated_logits(student, pairs, {Head(0, 0): ("all",)}, means),
        lambda: ablation_profiles(student, pairs, "zero", metrics="log_probability"),
        lambda: evaluate_circuit(student, pairs, whole_model((3, 4)), means),
    ]
    for door in doors:
        with student.training(), pytest.raises(InputError, match=r"training mode; call .eval\(\)"):
            door()
    assert not student.model.training


@pytest.mark.parametrize("head", [Head(3, 0), Head(0, 4)])
def test_an_unknown_head_is_refused_with_the_known_ones(llama, pairs, head):
    patcher = PathPatcher(llama, pairs)
    beyond = Circuit.of([Member(head, "A", "last")], shape=(9, 9), method="another model's")
    for attempt in (
        lambda: ablated_logits(llama, pairs, {head: ("all",)}, "zero"),
        lambda: ablation_profiles(llama, pairs, "zero", metrics="log_probability", heads=[head]),
        lambda: patcher.logits([head]),
        lambda: patcher.logits([Head(0, 0)], receivers=[Receiver(head, "q")]),
        lambda: patcher.logits([Head(0, 0)], receivers=[Receiver(head, "v")]),
        lambda: path_patch(llama, pairs, metric="log_probability", receivers=[Receiver(head, "k")]),
    ):
        with pytest.raises(InputError, match=rf"no head {head}: its layers are 0 to 2, its heads 0 to 3"):
            attempt()
    with pytest.raises(InputError, match="of a model of 9 layers x 9 heads"):
        evaluate_circuit(llama, pairs, beyond, reference_means(llama, entity_pairs(scenes=1)))


def test_an_unknown_mlp_is_refused(llama, pairs):
    patcher = PathPatcher(llama, pairs)
    with pytest.raises(InputError, match="no MLP M3: its layers are 0 to 2"):
        patcher.logits([Mlp(3)])


def test_an_unknown_position_is_refused_with_the_nearest_names(llama, pairs):
    patcher = PathPatcher(llama, pairs)
    stages = (Stage(name="A", title="fetcher", position="query_lable"),)
    for attempt in (
        lambda: patcher.logits([Head(0, 0)], "query_lable"),
        lambda: patcher.logits([Head(0, 0)], receivers=[Receiver(Head(1, 0), "q")], receiver_position="query_lable"),
        lambda: path_patch(llama, pairs, metric="log_probability", position="query_lable"),
        lambda: ablated_logits(llama, pairs, {Head(0, 0): ("query_lable",)}, "zero"),
        lambda: backward_search(llama, pairs, stages, DiscoveryConfig()),
    ):
        with pytest.raises(InputError, match=r"no position 'query_lable'; did you mean 'query_label'"):
            attempt()


def test_equal_clean_and_corrupt_metrics_are_refused(llama, pairs):
    same = replace(pairs, corrupt=pairs.clean)
    with pytest.raises(InputError, match=r"nothing to patch; make the corrupt prompts differ"):
        path_patch(llama, same, metric="log_probability")
    with pytest.raises(InputError, match="nothing to patch"):
        backward_search(llama, same, EntityTracking.stages, DiscoveryConfig())


def test_means_by_position_are_refused_beyond_the_longest_reference_prompt(llama, pairs):
    longer, scope = entity_pairs(scenes=1, boxes=4), {Head(0, 0): ("all",)}
    means = reference_means(llama, pairs)
    with pytest.raises(InputError, match=r"the longest reference prompt has 25 tokens.*one 32.*per_position=False"):
        ablated_logits(llama, longer, scope, means)
    ablated_logits(llama, longer, scope, reference_means(llama, pairs, per_position=False))
    ablated_logits(llama, pairs, scope, reference_means(llama, longer))  # means of more positions than are needed


def test_a_circuit_outside_its_shape_is_refused():
    with pytest.raises(InputError, match="L3H0 is outside a model of 3 layers x 4 heads"):
        Circuit.of([Member(Head(3, 0), "A", "last")], shape=(3, 4), method="by hand")
