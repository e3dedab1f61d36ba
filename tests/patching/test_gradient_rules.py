"""RelP and GIM: values stay, relevance is conserved, exact where the model is linear, and the gradients of the plain
`transformers` model with each rule written into it by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor
from transformers import LlamaForCausalLM

from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.models.parts import decoder_parts
from workbench.patching.attribution import attribute_edges, attribute_nodes
from workbench.patching.execution import Execution
from workbench.patching.gradient_rules import Rule, rule_edits, softened
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.refs import Embedding, Head

RULES = ("relp", "gim")
QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Two pairs of 3 boxes."""
    return entity_pairs(scenes=2).rows(slice(0, 2))


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Each architecture, two layers."""
    return Teacher.load(model_folder(request.param, layers=2))


@pytest.fixture(scope="module")
def llama(model_folder: Callable[..., Path]) -> Teacher:
    """Without biases."""
    return Teacher.load(model_folder("llama", layers=2))


def at_embedding(model: Teacher, pairs: PromptPairs, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings, gradient there by a rule, metric)."""
    parts, name = decoder_parts(model), hooks.residual_pre(0)
    assert parts is not None
    with torch.no_grad():
        leaf = model.activations(pairs.clean, pairs.mask, [name])[1][name].clone()
    leaf.requires_grad_()
    with torch.enable_grad(), hooks.edit(model.model, {name: lambda value: leaf, **rule_edits(model, parts, rule)}):
        values = logit_difference(model.final_logits(pairs.clean, pairs.mask), pairs.answers, pairs.distractors)
    return leaf.detach(), torch.autograd.grad(values.sum(), leaf)[0], values.detach()


def test_only_the_gradient_changes(model, pairs):
    plain = at_embedding(model, pairs, "plain")
    for rule in RULES:
        _, gradient, values = at_embedding(model, pairs, rule)
        assert torch.allclose(values, plain[2], atol=1e-5)
        assert float((gradient - plain[1]).abs().max()) > 0.01 * float(plain[1].abs().max())


def test_relevance_is_conserved(llama, pairs):
    embedded, gradient, values = at_embedding(llama, pairs, "relp")
    missing = ((embedded * gradient).sum((1, 2)) - values).abs()
    _, plain, _ = at_embedding(llama, pairs, "plain")
    assert float(missing.max()) < 1e-4 * float(values.abs().max())
    assert float(((embedded * plain).sum((1, 2)) - values).abs().min()) > 100 * float(missing.max())


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")  # that is what it is for
def test_where_the_model_is_linear_relp_is_exact(model_folder: Callable[..., Path], pairs):
    """Without MLPs, with patterns and scales held at their clean values by hooks, a head's corrupt output costs just
    what the sum over its edges says."""
    linear = Teacher.load(model_folder("llama", layers=2))
    inner: Any = linear.model
    for block in inner.blocks:
        block.mlp.original_component.down_proj.weight.data.zero_()
    scales = [hooks.norm_ends(which, layer)[1] for layer in range(2) for which in ("attention", "mlp")]
    held = [name.replace("hook_out", "hook_scale") for name in (*scales, hooks.norm_ends("final", 0)[1])]
    held += [hooks.pattern(layer) for layer in range(2)]
    z = [hooks.z(layer) for layer in range(2)]
    with torch.no_grad():
        _, clean = linear.activations(pairs.clean, pairs.mask, [*held, *z])
        _, corrupt = linear.activations(pairs.corrupt, pairs.mask, z)
    constant = {name: lambda value, name=name: clean[name] for name in held}

    def measured(edits: dict[str, Any]) -> Tensor:
        with torch.no_grad(), hooks.edit(linear.model, {**constant, **edits}):
            return logit_difference(linear.final_logits(pairs.clean, pairs.mask), pairs.answers, pairs.distractors)

    relp, eap = (
        attribute_nodes(attribute_edges(linear, pairs, metric="logit_difference", rule=rule, execution=QUIET))
        for rule in ("relp", "plain")
    )
    errors = []
    for head in (Head(0, 0), Head(0, 3), Head(1, 2)):
        name, mine = hooks.z(head.layer), (torch.arange(linear.n_heads) == head.index)[:, None]
        patched = {name: lambda value, mine=mine, name=name: torch.where(mine, corrupt[name], value)}
        exact = measured({}) - measured(patched)
        found = [scores.select(sender=str(head)).values for scores in (relp, eap)]
        errors.append([float((each - exact).abs().max()) / float(exact.abs().max()) for each in found])
    assert max(error for error, _ in errors) < 1e-4
    assert max(error for _, error in errors) > 1e-2


class Warm(torch.autograd.Function):
    """softmax(s), with the gradient of softmax(s / 2) to s / 2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(torch.softmax(scores / temperature, -1))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (warm,) = ctx.saved_tensors
        return warm * (gradients[0] - (gradients[0] * warm).sum(-1, keepdim=True)), None


def warm(scores: Tensor) -> Tensor:
    """At temperature 2."""
    value: Any = Warm.apply(scores, 2.0)
    return value


def scaled(share: float) -> Callable[..., Tensor]:
    """A forward hook that lets a share of the gradient through."""
    return lambda module, inputs, value: share * value + (1 - share) * value.detach()


@contextmanager
def by_hand(plain: LlamaForCausalLM, rule: Rule, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `transformers` Llama under a rule, module by module."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt().detach()

    def softmax(scores: Tensor, dim: int = -1, dtype: Any = None) -> Tensor:
        return SOFTMAX(scores, dim=dim).detach() if rule == "relp" else warm(scores)

    handles: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(plain.model.norm), "forward", norm)
        patch.setattr(torch.nn.functional, "softmax", softmax)
        layers: Any = plain.model.layers
        for layer in layers:
            mlp = layer.mlp
            handles += [each.register_forward_hook(scaled(0.5)) for each in (mlp.up_proj, mlp.act_fn)]
            if rule == "relp":
                patch.setattr(mlp.act_fn, "forward", lambda x: x * torch.sigmoid(x).detach())
            else:
                handles += [
                    getattr(layer.self_attn, f"{name}_proj").register_forward_hook(scaled(0.25)) for name in "qk"
                ]
                handles.append(layer.self_attn.v_proj.register_forward_hook(scaled(0.5)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


SOFTMAX = torch.nn.functional.softmax


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_that_of_the_plain_model_under_the_rule(model_folder, llama, pairs, rule, monkeypatch):
    plain = LlamaForCausalLM.from_pretrained(model_folder("llama", layers=2), attn_implementation="eager").eval()
    embedded, gradient, values = at_embedding(llama, pairs, rule)
    leaf = embedded.clone().requires_grad_()
    with by_hand(plain, rule, monkeypatch), torch.enable_grad():
        logits = plain(inputs_embeds=leaf, attention_mask=pairs.mask.long()).logits[:, -1]
        expected = logit_difference(logits, pairs.answers, pairs.distractors)
        slow = torch.autograd.grad(expected.sum(), leaf)[0]
    assert bool(pairs.mask[:, -1].all())
    assert torch.allclose(values, expected, atol=1e-4)
    assert float((gradient - slow).abs().max()) < 1e-4 * float(slow.abs().max())
    other = at_embedding(llama, pairs, "plain")[1]
    assert float((other - slow).abs().max()) > 1e-2 * float(slow.abs().max())


def test_edges_of_an_embedding_sum_to_its_gradient(model, pairs):
    """The receivers' side takes the same norms: a sender's edges add up to its change times the gradient there."""
    name = hooks.residual_pre(0)
    with torch.no_grad():
        clean, corrupt = (
            model.activations(tokens, pairs.mask, [name])[1][name] for tokens in (pairs.clean, pairs.corrupt)
        )
    for rule in RULES:
        scores = attribute_nodes(attribute_edges(model, pairs, metric="logit_difference", rule=rule, execution=QUIET))
        expected = ((clean - corrupt) * at_embedding(model, pairs, rule)[1]).sum((1, 2))
        found = scores.select(sender=str(Embedding())).values
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert float(expected.abs().max()) > 0.05
        assert {"relp": "RelP", "gim": "GIM"}[rule] in scores.unit


def test_a_softened_pattern_keeps_its_value_and_what_is_hidden():
    scores = torch.tensor([[2.0, 2.0, -1.0, -torch.inf]], requires_grad=True)
    weight = torch.tensor([1.0, 0.5, -2.0, 3.0])
    (soft,) = torch.autograd.grad((softened(scores.softmax(-1)) * weight).sum(), scores)
    (expected,) = torch.autograd.grad((warm(scores) * weight).sum(), scores)
    (plain,) = torch.autograd.grad((scores.softmax(-1) * weight).sum(), scores)
    assert torch.allclose(softened(scores.softmax(-1)), scores.softmax(-1))
    assert torch.allclose(soft, expected, atol=1e-6)
    assert float(soft[0, 3]) == 0.0
    assert float((soft - plain).abs().max()) > 0.1
