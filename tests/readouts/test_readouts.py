"""Readouts: parts sum to the whole, the lens ends in the prediction, weighted attention is the norm of what moves; and
TransformerLens agrees."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from transformers import AutoModelForCausalLM, Gemma2Config

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Teacher, last_position
from workbench.models.sources import quiet
from workbench.patching.ablation import plain_logits
from workbench.pretraining import word_tokenizer
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.readouts.logit_lens import lens_scores, logit_lens
from workbench.readouts.patterns import attention_patterns
from workbench.values.metrics import METRICS
from workbench.values.refs import Head

LEGACY = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
CLOSE = 2e-4
ARCHITECTURES = ["llama", "llama-mha", "gpt2", "neox"]
Load = Callable[..., Any]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
contract = pytest.mark.contract


def lens_cache(model: HookedModel, tokens: torch.Tensor) -> Any:
    """TransformerLens' own cache of a run."""
    return model.model.run_with_cache(tokens)[1]  # pyright: ignore[reportAttributeAccessIssue]


@contract
@each_architecture
def test_parts_sum_to_the_models_logit_difference(architecture: str, load_teacher: Load) -> None:
    model, pairs = load_teacher(architecture), entity_pairs()
    found = direct_logit_attribution(model, pairs, batch=5)
    expected = METRICS["logit_difference"](plain_logits(model, pairs), pairs.answers, pairs.distractors)
    assert torch.allclose(found.total, expected, atol=CLOSE)
    assert torch.allclose(found.sum(), expected, atol=CLOSE)
    for part in (found.heads, found.mlps, found.rest):  # leaving any kind of part out would be seen
        assert float(part.values.abs().max()) > 100 * CLOSE
    biased = architecture in ("gpt2", "neox")
    assert found.rest.labels["part"] == (
        "embed",
        *((f"L{layer} b_O" for layer in range(3)) if biased else ()),
        "final biases",
    )
    frame = found.to_frame()
    assert frame["mean"].sum() == pytest.approx(float(expected.mean()), abs=CLOSE)
    assert set(frame["part"]) >= {"L0H0", "L2H3", "M1", "embed", "final biases"}


@contract
@each_architecture
def test_a_heads_share_is_what_its_output_adds_with_the_scale_frozen(architecture: str, load_teacher: Load) -> None:
    """The slow reference: take the head's vector out of the final stream, divide by the old scale, unembed with the
    model's own norm weights."""
    model, pairs = load_teacher(architecture), entity_pairs(scenes=1)
    found = direct_logit_attribution(model, pairs)
    names = [hooks.residual_post(2), *map(hooks.z, range(3))]
    _, run = model.activations(pairs.clean, pairs.mask, names)
    norm = torch.nn.functional
    plain: Any = getattr(model.model.ln_final, "original_component", model.model.ln_final)
    weight, bias = (
        getattr(plain, long, getattr(plain, short, None)) for long, short in (("weight", "w"), ("bias", "b"))
    )
    for row, last in enumerate(last_position(pairs.mask).tolist()):
        x = run[hooks.residual_post(2)][row, last]
        for head in (Head(0, 1), Head(2, 3)):
            vector = run[hooks.z(head.layer)][row, last, head.index] @ model.output_weights(head.layer)[head.index]
            answers = []
            for stream in (x, x - vector):
                centred = architecture in ("gpt2", "neox")
                scale = (x.var(correction=0) if centred else x.square().mean()) + 1e-5 * (1 if centred else 0.1)
                read = ((stream - stream.mean()) if centred else stream) / scale.sqrt() * weight + (
                    bias if bias is not None else 0.0
                )
                logits = norm.linear(read, model.model.W_U.T, model.model.b_U)  # pyright: ignore[reportAttributeAccessIssue]
                answers.append(logits[pairs.answers[row]] - logits[pairs.distractors[row]])
            assert float(answers[0] - answers[1]) == pytest.approx(float(found.heads.at(head)[row]), abs=CLOSE)
            assert float((answers[0] - answers[1]).abs()) > CLOSE


@contract
@pytest.mark.parametrize("architecture", ["llama-mha", "gpt2"])
def test_transformerlens_attributes_the_same(architecture: str, load_teacher: Load) -> None:
    """`ActivationCache.logit_attrs` of the stacked heads, on prompts without padding; its RMS and LayerNorm leave out
    the norm's weight: fold it in."""
    model, pairs = load_teacher(architecture), entity_pairs()
    keep = pairs.mask.sum(1) == pairs.mask.sum(1).max()
    pairs = pairs.rows(keep.nonzero().flatten())
    pairs = replace(
        pairs,
        clean=pairs.clean[:, -int(pairs.mask.sum(1).max()) :],
        mask=pairs.mask[:, -int(pairs.mask.sum(1).max()) :],
        positions={},
    )
    found = direct_logit_attribution(model, replace_positions(pairs))
    cache = lens_cache(model, pairs.clean)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)[:12]
    plain: Any = getattr(model.model.ln_final, "original_component", model.model.ln_final)
    weight = getattr(plain, "weight", getattr(plain, "w", None))
    read = (model.model.W_U[:, pairs.answers] - model.model.W_U[:, pairs.distractors]).T * weight  # pyright: ignore[reportAttributeAccessIssue]
    scaled = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1)
    theirs = torch.einsum("hbd,bd->hb", scaled, read)
    assert torch.allclose(found.heads.values.flatten(0, 1), theirs, atol=CLOSE)
    assert float(theirs.abs().max()) > 100 * CLOSE


def replace_positions(pairs: Any) -> Any:
    """The same pairs with `last` and `all` for their new length."""
    last = torch.zeros_like(pairs.mask)
    last[:, -1] = True
    return replace(pairs, positions={"last": last, "all": pairs.mask}, corrupt=pairs.corrupt[:, -pairs.mask.shape[1] :])


@contract
@each_architecture
def test_the_lens_ends_in_the_prediction_and_starts_at_the_embedding(architecture: str, load_teacher: Load) -> None:
    model, pairs = load_teacher(architecture), entity_pairs()
    prompt, answer = pairs.clean[0][pairs.mask[0]], int(pairs.answers[0])
    seen = logit_lens(model, prompt, answer)
    assert seen.stages == ("embed", "L0", "L1", "L2")
    logits = model.model(prompt[None])[0]
    assert torch.allclose(seen.of_answer[-1], logits.softmax(-1)[:, answer], atol=1e-5)
    assert [row[0] for row in seen.top[-1]] == [model.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
    assert float((seen.of_answer[0] - seen.of_answer[-1]).abs().max()) > 1e-3
    frame = seen.to_frame()
    assert len(frame) == 4 * len(prompt)
    assert frame["answer_probability"].to_numpy() == pytest.approx(seen.of_answer.flatten().numpy())


@contract
@each_architecture
def test_the_lens_of_pairs_is_the_lens_of_each_prompt(architecture: str, load_teacher: Load) -> None:
    """Padding and batching change nothing; the last stage is the model's metric."""
    model, pairs = load_teacher(architecture), entity_pairs()
    scores = lens_scores(model, pairs, metric="probability", batch=5)
    for row in (0, len(pairs) - 1):
        alone = logit_lens(model, pairs.clean[row][pairs.mask[row]], int(pairs.answers[row]))
        assert torch.allclose(scores.values[:, row], alone.of_answer[:, -1], atol=1e-5)
    expected = METRICS["probability"](plain_logits(model, pairs), pairs.answers, pairs.distractors)
    assert torch.allclose(scores.values[-1], expected, atol=1e-5)
    assert float((scores.values[-1] - scores.values[0]).abs().max()) > 1e-3


def test_transformerlens_accumulates_the_same_stream(load_teacher: Load) -> None:
    """`accumulated_resid(apply_ln=True)` through the model's own unembedding is the lens (gpt2: its norm's weights
    folded in by hand)."""
    model, pairs = load_teacher("gpt2"), entity_pairs()
    prompt = pairs.clean[0][pairs.mask[0]]
    seen = logit_lens(model, prompt, int(pairs.answers[0]))
    streams = lens_cache(model, prompt[None]).accumulated_resid(layer=-1, incl_mid=False, apply_ln=False)[:, 0]
    logits = model.model.unembed(model.model.ln_final(streams))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(seen.of_answer, logits.softmax(-1)[..., int(pairs.answers[0])], atol=1e-5)


@contract
@each_architecture
def test_patterns_are_the_models_and_weighted_ones_the_norms_of_what_moves(
    architecture: str, load_teacher: Load
) -> None:
    model, pairs = load_teacher(architecture), entity_pairs()
    prompt = pairs.clean[0][pairs.mask[0]]
    heads = (Head(0, 0), Head(1, 3), Head(2, 1))
    plain, weighted = (
        attention_patterns(model, prompt, heads),
        attention_patterns(model, prompt, heads, value_weighted=True),
    )
    names = [kind(layer) for layer in range(3) for kind in (hooks.pattern, hooks.v, hooks.z)]
    _, run = model.activations(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool), names)
    assert not plain.value_weighted
    assert weighted.value_weighted
    assert torch.allclose(plain.weights.sum(-1), torch.ones(3, len(prompt)), atol=1e-5)
    assert float(plain.weights.triu(1).abs().max()) == 0
    for place, head in enumerate(heads):
        pattern = run[hooks.pattern(head.layer)][0, head.index]
        values = run[hooks.v(head.layer)][0, :, model.kv_head(head)] @ model.output_weights(head.layer)[head.index]
        assert torch.allclose(plain.weights[place], pattern, atol=1e-6)
        for query in range(len(prompt)):
            moved = torch.stack([pattern[query, key] * values[key] for key in range(len(prompt))])
            assert torch.allclose(weighted.weights[place, query], moved.norm(dim=-1), atol=1e-5)
        written = model.head_outputs(head.layer, run[hooks.z(head.layer)])[0, :, head.index]
        assert torch.allclose(
            torch.einsum("qk,kd->qd", pattern, values), written, atol=1e-4
        )  # the vectors whose norms are shown make the head's output
    assert float((weighted.weights - plain.weights).abs().max()) > 1e-2
    frame = plain.to_frame()
    assert len(frame) == 3 * len(prompt) * (len(prompt) + 1) // 2
    assert frame.groupby(["head", "query"])["weight"].sum().to_numpy() == pytest.approx(1.0, abs=1e-5)


def test_bad_input_is_refused(load_teacher: Load) -> None:
    model, pairs = load_teacher(), entity_pairs()
    prompt = pairs.clean[0][pairs.mask[0]]
    with pytest.raises(InputError, match="no head L9H0"):
        attention_patterns(model, prompt, [Head(9, 0)])
    with pytest.raises(InputError, match="at least one head"):
        attention_patterns(model, prompt, [])
    with pytest.raises(InputError, match="no token of a vocabulary"):
        logit_lens(model, prompt, 10**6)


@pytest.mark.skipif(LEGACY, reason="directories of this architecture load on TransformerLens 4 only")
def test_a_model_whose_parts_do_not_sum_is_refused(tmp_path: Any) -> None:
    """Gemma 2 normalises after attention and caps its logits: no exact decomposition, so none is given."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=len(word_tokenizer()),
            final_logit_softcapping=2.0,
            pad_token_id=0,
            initializer_range=0.5,
            **sizes,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        word_tokenizer().save_pretrained(tmp_path)
    model = Teacher.load(tmp_path, check=False)
    with pytest.raises(InputError, match="do not sum to its logits"):
        direct_logit_attribution(model, entity_pairs())
