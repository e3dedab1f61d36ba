"""The hooked model against the same model run by plain `transformers`, head slices against what they really change, and
the refusals.

Everything marked `contract` also runs on TransformerLens 3.9, where `load` gives a `HookedTransformer` instead of a
`TransformerBridge`.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFolder
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Student, Teacher, WeightSlice, last_position, self_check
from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer
from workbench.values.refs import Head

LEGACY = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
bridge_only = pytest.mark.skipif(LEGACY, reason="a HookedTransformer can't be saved as a transformers directory")
legacy_only = pytest.mark.skipif(not LEGACY, reason="HookedTransformer exists up to TransformerLens 3.9")
contract = pytest.mark.contract

ARCHITECTURES = ["llama", "llama-mha", "llama-mqa", "gpt2", "neox"]
LAYERS, HEADS, D_HEAD, D_MODEL = 3, 4, 8, 32
CLOSE = 2e-5
"""Allowed rounding, where the compared activations are of size 1 to 30."""

Prompts = list[Int[Tensor, " pos"]]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_teacher(model_folder: ModelFolder) -> Load:
    """One frozen model per architecture, for tests that only read it."""
    return cache(lambda architecture="llama": Teacher.load(model_folder(architecture)))


@pytest.fixture(scope="module")
def shared_student(model_folder: ModelFolder) -> Load:
    """One trainable model per architecture, for tests that leave its weights as they were."""
    return cache(lambda architecture="llama": Student.load(model_folder(architecture)))


def kv_heads_of(architecture: str) -> int:
    return {"llama": 2, "llama-mqa": 1}.get(architecture, HEADS)


# --- the reference: torch hooks on the plain transformers model ---

PARTS = {
    "llama": ("model.layers", "self_attn", "o_proj"),
    "gpt2": ("transformer.h", "attn", "c_proj"),
    "neox": ("gpt_neox.layers", "attention", "dense"),
}
"""Where an architecture keeps its blocks, in them the attention, and in that the output projection."""


def plain_model(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


plain_once = cache(plain_model)
"""The plain model of a session-wide folder; hooks put on it are taken off again."""


def plain_parts(plain: Any, architecture: str) -> Iterator[tuple[Any, Any, Any]]:
    """(block, attention, output projection) of every layer."""
    blocks, attention, output = PARTS[architecture.split("-")[0]]
    for block in plain.get_submodule(blocks):
        yield block, getattr(block, attention), getattr(getattr(block, attention), output)


def split_qkv(attention: Any, architecture: str, states: Tensor) -> list[Tensor]:
    """q, k and v of a plain attention module from its input: [batch pos head d_head] each."""
    if architecture.startswith("llama"):
        flat = [attention.q_proj(states), attention.k_proj(states), attention.v_proj(states)]
    elif architecture == "gpt2":
        flat = list(attention.c_attn(states).split(D_MODEL, dim=-1))
    else:
        by_head = attention.query_key_value(states).unflatten(-1, (HEADS, 3, D_HEAD))
        return list(by_head.unbind(-2))
    return [part.unflatten(-1, (-1, D_HEAD)) for part in flat]


@torch.no_grad()
def reference(
    folder: Path, architecture: str, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and activations by hook name, recorded on the plain model."""
    plain, handles = plain_once(folder), []
    found: dict[str, Tensor] = {}

    def record(
        name: str, pick: Callable[[Any, Any], Tensor], module: Any, inputs: Any, kwargs: Any, output: Any
    ) -> None:
        found[name] = pick((*inputs, *kwargs.values()), output if isinstance(output, Tensor) else output[0])

    for layer, (block, attention, output) in enumerate(plain_parts(plain, architecture)):
        watched = [
            (block, hooks.residual_pre(layer), lambda inputs, _: inputs[0]),
            (block, hooks.residual_post(layer), lambda _, output: output),
            (block.mlp, hooks.mlp_output(layer), lambda _, output: output),
            (attention, hooks.attention_output(layer), lambda _, output: output),
            (output, hooks.z(layer), lambda inputs, _: inputs[0].unflatten(-1, (HEADS, D_HEAD))),
            *(
                (
                    attention,
                    name(layer),
                    lambda inputs, _, a=attention, i=index: split_qkv(a, architecture, inputs[0])[i],
                )
                for index, name in enumerate((hooks.q, hooks.k, hooks.v))
            ),
        ]
        for module, name, pick in watched:
            handles.append(module.register_forward_hook(partial(record, name, pick), with_kwargs=True))
    output = plain(tokens, attention_mask=mask.long(), position_ids=positions(mask), output_attentions=True)
    for handle in handles:
        handle.remove()
    return output.logits, found | {hooks.pattern(layer): rows for layer, rows in enumerate(output.attentions)}


def positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def layer_names(layer: int) -> list[str]:
    builders = (
        hooks.residual_pre,
        hooks.q,
        hooks.k,
        hooks.v,
        hooks.pattern,
        hooks.z,
        hooks.attention_output,
        hooks.mlp_output,
        hooks.residual_post,
    )
    return [name(layer) for name in builders]


ALL_NAMES = [name for layer in range(LAYERS) for name in layer_names(layer)]


# --- prompts ---


def prompts(lengths: Sequence[int] = (11, 7, 4), seed: int = 0) -> Prompts:
    """Random prompts of real words (no special tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, len(word_tokenizer()), (length,), generator=generator) for length in lengths]


def padded(texts: Prompts, side: str) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    width = max(len(text) for text in texts)
    tokens, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        tokens[row, place], mask[row, place] = text, True
    return tokens, mask


def unpadded(length: int = 9, batch: int = 3) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    return padded(prompts([length] * batch), "left")


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


# --- activations and logits equal transformers' ---


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_activations_equal_transformers(
    architecture: str, model_folder: ModelFolder, shared_teacher: Load
) -> None:
    folder = model_folder(architecture)
    teacher = shared_teacher(architecture)
    tokens, mask = unpadded()
    logits, found = teacher.activations(tokens, mask, [hooks.embedding(), *ALL_NAMES])
    expected, recorded = reference(folder, architecture, tokens, mask)
    assert largest(logits - expected[:, -1]) < CLOSE
    for name, value in recorded.items():
        assert found[name].shape == value.shape, name
        assert largest(found[name] - value) < CLOSE, name
        assert largest(value) > 100 * CLOSE, name
    assert found.keys() - recorded.keys() == {hooks.embedding()}
    assert found[hooks.embedding()].shape == (*tokens.shape, D_MODEL)  # as many positions as tokens: no BOS was added


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes(architecture: str, shared_teacher: Load) -> None:
    teacher, kv_heads = shared_teacher(architecture), kv_heads_of(architecture)
    assert (teacher.n_layers, teacher.n_heads, teacher.n_kv_heads, teacher.d_head) == (LAYERS, HEADS, kv_heads, D_HEAD)
    assert teacher.d_vocab == len(word_tokenizer())
    assert teacher.heads == [Head(layer, index) for layer in range(LAYERS) for index in range(HEADS)]
    tokens, mask = unpadded(9, 3)
    logits, found = teacher.activations(tokens, mask, layer_names(1))
    assert logits.shape == (3, teacher.d_vocab)
    assert {found[name(1)].shape for name in (hooks.z, hooks.q)} == {(3, 9, HEADS, D_HEAD)}
    assert {found[name(1)].shape for name in (hooks.k, hooks.v)} == {(3, 9, kv_heads, D_HEAD)}
    assert found[hooks.pattern(1)].shape == (3, HEADS, 9, 9)
    stream = (hooks.residual_pre, hooks.residual_post, hooks.mlp_output, hooks.attention_output)
    assert {found[name(1)].shape for name in stream} == {(3, 9, D_MODEL)}


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_head_takes_the_heads_own_part_and_its_group(architecture: str, shared_teacher: Load) -> None:
    teacher = shared_teacher(architecture)
    _, found = teacher.activations(*unpadded(), layer_names(2))
    group = HEADS // kv_heads_of(architecture)
    for index in range(HEADS):
        head = Head(2, index)
        assert teacher.kv_head(head) == index // group
        for name in (hooks.z(2), hooks.q(2)):
            assert torch.equal(teacher.of_head(head, name, found[name]), found[name][:, :, index])
        for name in (hooks.k(2), hooks.v(2)):
            assert torch.equal(teacher.of_head(head, name, found[name]), found[name][:, :, index // group])
        assert torch.equal(
            teacher.of_head(head, hooks.pattern(2), found[hooks.pattern(2)]), found[hooks.pattern(2)][:, index]
        )
    for name in (hooks.z(1), hooks.mlp_output(2)):
        with pytest.raises(InputError, match=f"{name!r} is not an activation that belongs to L2H0"):
            teacher.of_head(Head(2, 0), name, found[hooks.z(2)])


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_z_is_the_pattern_times_the_groups_values(architecture: str, shared_teacher: Load) -> None:
    teacher = shared_teacher(architecture)
    _, found = teacher.activations(*unpadded(), layer_names(1))
    for index in range(HEADS):
        z, v, rows = (
            teacher.of_head(Head(1, index), name(1), found[name(1)]) for name in (hooks.z, hooks.v, hooks.pattern)
        )
        assert largest(rows @ v - z) < CLOSE
        assert rows.triu(1).count_nonzero() == 0


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_outputs_add_up_and_equal_the_output_projection_sliced_by_hand(
    architecture: str, model_folder: ModelFolder, shared_teacher: Load
) -> None:
    folder = model_folder(architecture)
    teacher = shared_teacher(architecture)
    for layer, (_, _, projection) in enumerate(plain_parts(plain_once(folder), architecture)):
        _, found = teacher.activations(*unpadded(), [hooks.z(layer), hooks.attention_output(layer)])
        z, written = found[hooks.z(layer)], teacher.head_outputs(layer, found[hooks.z(layer)]).detach()
        weight = projection.weight if architecture == "gpt2" else projection.weight.T  # Conv1D stores [in, out]
        for index in range(HEADS):
            by_hand = z[:, :, index] @ weight[index * D_HEAD : (index + 1) * D_HEAD]
            assert largest(written[:, :, index] - by_hand) < CLOSE
        bias = teacher.output_bias(layer)
        assert (projection.bias is None) == (bias is None or not bias.any())
        total = written.sum(2) + (0 if bias is None else bias)
        assert largest(total - found[hooks.attention_output(layer)]) < CLOSE
        assert largest(written[:, :, 0] - written[:, :, 1]) > 1e3 * CLOSE


@contract
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_prompts(
    side: str, architecture: str, model_folder: ModelFolder, shared_teacher: Load
) -> None:
    folder = model_folder(architecture)
    teacher = shared_teacher(architecture)
    texts = prompts()
    tokens, mask = padded(texts, side)
    logits, found = teacher.activations(tokens, mask, ALL_NAMES)
    for row, text in enumerate(texts):
        alone = text[None], torch.ones(1, len(text), dtype=torch.bool)
        expected, recorded = reference(folder, architecture, *alone)
        single, one = teacher.activations(*alone, ALL_NAMES)
        real = mask[row]
        assert largest(logits[row] - expected[0, -1]) < CLOSE
        assert largest(single[0] - expected[0, -1]) < CLOSE
        for name in ALL_NAMES:
            value = found[name][row]
            value = value[:, real][:, :, real] if name.endswith("pattern") else value[real]
            assert largest(value - one[name][0]) < CLOSE, name
            assert largest(value - recorded[name][0]) < CLOSE, name
    ignoring = teacher.final_logits(tokens, torch.ones_like(mask))
    assert largest((ignoring - logits)[1:]) > 100 * CLOSE  # the mask matters


@contract
def test_a_prompt_may_begin_with_the_pad_token(
    architecture: str, model_folder: ModelFolder, shared_teacher: Load
) -> None:
    """GPT-2 and others use one token for padding and for the start of a text: it is masked by the mask only, never by
    its number."""
    folder = model_folder(architecture)
    tokens, mask = unpadded()
    tokens[:, :2] = shared_teacher(architecture).tokenizer.pad_token_id
    logits = shared_teacher(architecture).final_logits(tokens, mask)
    assert largest(logits - reference(folder, architecture, tokens, mask)[0][:, -1]) < CLOSE


def tiny_folder(target: Path, config: type, **settings: Any) -> Path:
    """A saved model of another configuration, two layers of four heads."""
    sizes = {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
    }
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config(
                **{
                    "vocab_size": len(word_tokenizer()),
                    "max_position_embeddings": 256,
                    "initializer_range": 0.2,
                    **sizes,
                    **ids,
                    **settings,
                }
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at 0, which would hide that they are forgotten
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(target)
    word_tokenizer().save_pretrained(target)
    return target


@contract
def test_scaled_rotary_embeddings_hold_beyond_the_short_prompts_of_the_self_check(tmp_path: Path) -> None:
    """Llama 3's scaling of the slow rotations, here of a context of 32."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = tiny_folder(tmp_path, LlamaConfig, rope_parameters={**scaling, "rope_theta": 500_000.0})
    tokens, mask = unpadded(120, 1)
    with torch.no_grad():
        expected = plain_model(folder)(tokens).logits[:, -1]
        unscaled = plain_model(
            tiny_folder(
                tmp_path / "plain", LlamaConfig, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}
            )
        )
        assert largest(unscaled(tokens).logits[:, -1] - expected) > 100 * CLOSE
    assert largest(Teacher.load(folder).final_logits(tokens, mask) - expected) < 5 * CLOSE


@contract
@legacy_only
def test_a_config_that_39_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"TransformerLens 3.9 does not read this LlamaForCausalLM config .*; use TransformerLens 4"
    ):
        Teacher.load(tiny_folder(tmp_path / "wide", LlamaConfig, head_dim=16))
    with pytest.raises(InputError, match="fails the self-check: its logits differ"):
        Teacher.load(tiny_folder(tmp_path / "biased", LlamaConfig, attention_bias=True, mlp_bias=True))
    with pytest.raises(InputError, match="Qwen2ForCausalLM directories load on TransformerLens 4"):
        Teacher.load(tiny_folder(tmp_path / "qwen", Qwen2Config))


@contract
def test_last_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert last_position(mask).tolist() == [3, 3, 0, 2]


@contract
def test_the_tokenizer_is_the_saved_one_and_adds_no_bos(shared_teacher: Load, model_folder: ModelFolder) -> None:
    saved, ours = AutoTokenizer.from_pretrained(model_folder("llama")), shared_teacher("llama").tokenizer
    text = "The apple is in Box F ."
    assert ours(text)["input_ids"] == saved(text)["input_ids"] == word_tokenizer()(text)["input_ids"]
    assert ours.special_tokens_map == saved.special_tokens_map
    assert ours.get_vocab() == saved.get_vocab()


@contract
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_weights_and_activations(dtype: Any, model_folder: ModelFolder) -> None:
    teacher = Teacher.load(model_folder("llama"), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in teacher.parameters().values()} == {wanted}
    _, found = teacher.activations(*unpadded(), [hooks.z(0)])
    assert found[hooks.z(0)].dtype == wanted


@contract
def test_a_dtype_in_which_transformers_itself_fails_is_refused(model_folder: ModelFolder) -> None:
    with pytest.raises(
        InputError, match="no finite logits on a padded batch in float64, in `transformers` itself; load it in float32"
    ):
        Teacher.load(
            model_folder("llama"), dtype="float64"
        )  # its softmax is in float32, where the mask's value is minus infinity
    assert Teacher.load(model_folder("gpt2"), dtype="float64").output_weights(0).dtype == torch.float64


@bridge_only
def test_the_device_is_where_the_weights_are(model_folder: ModelFolder) -> None:
    teacher = Teacher.load(model_folder("llama"), device="meta", check=False)
    assert {parameter.device.type for parameter in teacher.parameters().values()} == {"meta"}
    assert teacher.device.type == "meta"


# --- gradients ---


def covered(parts: Sequence[WeightSlice], parameters: dict[str, Any]) -> dict[str, Tensor]:
    """How often each scalar of each parameter is in the slices."""
    counts: dict[str, Tensor] = {}
    for part in parts:
        counts.setdefault(part.parameter, torch.zeros_like(parameters[part.parameter]))[part.index] += 1
    return counts


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_z_reach_the_heads_own_slices_and_no_others(architecture: str, shared_student: Load) -> None:
    student = shared_student(architecture)
    layer, parameters = LAYERS - 1, student.parameters()
    every = student.head_slices(Head(layer, 0)) + student.head_slices(Head(layer, HEADS - 1))
    in_layer = {part.parameter for part in every}
    weights = torch.randn(D_HEAD, generator=torch.Generator().manual_seed(0))
    for index in range(HEADS):
        head = Head(layer, index)
        _, found = student.activations(*unpadded(), [hooks.z(layer)], gradients=True)
        loss = (student.of_head(head, hooks.z(layer), found[hooks.z(layer)]) * weights).sum()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in sorted(in_layer)], allow_unused=True)
        own = covered(student.head_slices(head, ("q", "k", "v")), parameters)
        for name, gradient in zip(sorted(in_layer), gradients, strict=True):
            if name not in own:  # W_O comes after z
                assert gradient is None or not gradient.any(), name
                continue
            assert gradient is not None, name
            assert gradient[own[name] == 0].count_nonzero() == 0, name
            if "bias" not in name and "b_" not in name:  # a key's bias moves all scores of a row alike
                assert largest(gradient[own[name] == 1]) > 1e-4, name
    assert all(parameter.grad is None for parameter in parameters.values())


@contract
def test_gradients_are_off_unless_asked_for(shared_student: Load) -> None:
    student = shared_student()
    logits, found = student.activations(*unpadded(), ALL_NAMES)
    assert not logits.requires_grad
    assert not any(value.requires_grad for value in found.values())
    logits, found = student.activations(*unpadded(), ALL_NAMES, gradients=True)
    assert logits.requires_grad
    assert all(value.requires_grad for value in found.values())


@contract
def test_a_detached_capture_carries_no_gradient_and_leaves_the_forwards_alone(shared_student: Load) -> None:
    student = shared_student()
    tokens, mask = unpadded()
    with hooks.capture(student.model, [hooks.z(1)]) as found:
        logits = student.final_logits(tokens, mask)
    assert not found[hooks.z(1)].requires_grad
    assert logits.requires_grad
    with torch.no_grad(), hooks.capture(student.model, [hooks.z(1)], detach=False) as inside:
        student.final_logits(tokens, mask)
    assert torch.equal(inside[hooks.z(1)], found[hooks.z(1)])


@contract
def test_gradients_of_an_activation_equal_finite_differences(shared_student: Load) -> None:
    """The step along the gradient of a head's z changes the loss by the gradient's squared length."""
    student = shared_student("gpt2")
    tokens, mask = unpadded()
    part = student.head_slices(Head(1, 2), ("v",))[0]
    parameter = student.parameters()[part.parameter]

    def loss() -> Tensor:
        _, found = student.activations(tokens, mask, [hooks.z(2)], gradients=True)
        return found[hooks.z(2)][:, -1].double().square().sum()

    before = loss()
    gradient = torch.autograd.grad(before, parameter)[0][part.index]
    step = 1e-3 / float(gradient.norm())
    with torch.no_grad():
        kept = parameter[part.index].clone()
        parameter[part.index] += step * gradient
        change = float(loss() - before)
        parameter[part.index] = kept
    assert change == pytest.approx(step * float(gradient.square().sum()), rel=2e-2)


# --- head slices ---


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_of_all_heads_cover_the_attention_weights_exactly_once(architecture: str, shared_student: Load) -> None:
    student, kv_heads = shared_student(architecture), kv_heads_of(architecture)
    parameters = student.parameters()
    representatives = [Head(layer, index * HEADS // kv_heads) for layer in range(LAYERS) for index in range(kv_heads)]
    parts = [part for head in student.heads for part in student.head_slices(head, ("q", "o"))]
    parts += [part for head in representatives for part in student.head_slices(head, ("k", "v"))]
    counts = covered(parts, parameters)
    assert all(bool((count == 1).all()) for count in counts.values())
    biased = architecture in (
        "gpt2",
        "neox",
    )  # Llama has no biases; the added zeros of a HookedTransformer belong to nobody
    rows = LAYERS * D_HEAD * (HEADS + 2 * kv_heads)
    assert sum(count.numel() for count in counts.values()) == rows * (D_MODEL + biased) + LAYERS * D_MODEL * D_MODEL
    assert len(counts) == LAYERS * (7 if biased else 4)


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_of_a_group_share_keys_and_values_only(architecture: str, shared_student: Load) -> None:
    student = shared_student(architecture)
    for one in range(HEADS):
        for other in range(HEADS):
            for matrix in ("q", "k", "v", "o"):
                mine, theirs = (student.head_slices(Head(1, index), (matrix,)) for index in (one, other))
                same = one == other or (
                    matrix in "kv" and student.kv_head(Head(1, one)) == student.kv_head(Head(1, other))
                )
                assert (mine == theirs) == same
    parts = student.head_slices(Head(0, 1))
    assert parts == [part for matrix in ("q", "k", "v", "o") for part in student.head_slices(Head(0, 1), (matrix,))]


def _changed_heads(before: Tensor, after: Tensor) -> set[int]:
    """Heads whose activation changed; the others' are the same to the bit."""
    return {index for index in range(before.shape[2]) if not torch.equal(before[:, :, index], after[:, :, index])}


@contextmanager
def perturbed(student: HookedModel, parts: Sequence[WeightSlice]) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    parameters = student.parameters()
    kept = {part.parameter: parameters[part.parameter].detach().clone() for part in parts}
    with torch.no_grad():
        for part in parts:
            view = parameters[part.parameter][part.index]
            parameters[part.parameter][part.index] = view + 0.3 * torch.randn(view.shape, generator=generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


@contract
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perturbing_a_heads_slices_changes_that_head_alone(architecture: str, shared_student: Load) -> None:
    student, layer = shared_student(architecture), 1
    names = [hooks.q(layer), hooks.k(layer), hooks.v(layer), hooks.z(layer)]
    tokens, mask = unpadded()

    def run() -> tuple[dict[str, Tensor], Tensor]:
        _, found = student.activations(tokens, mask, names)
        return found, student.head_outputs(layer, found[hooks.z(layer)]).detach()

    before, written = run()
    for index in range(HEADS):
        head, kv_head = Head(layer, index), student.kv_head(Head(layer, index))
        group = {other for other in range(HEADS) if student.kv_head(Head(layer, other)) == kv_head}
        for matrix, expected in {
            "q": ({index}, set(), set(), {index}, {index}),
            "k": (set(), {kv_head}, set(), group, group),
            "v": (set(), set(), {kv_head}, group, group),
            "o": (set(), set(), set(), set(), {index}),
            "qkvo": ({index}, {kv_head}, {kv_head}, group, group),
        }.items():
            with perturbed(student, student.head_slices(head, tuple(matrix))):
                after, rewritten = run()
            changes = (
                *(_changed_heads(before[name], after[name]) for name in names),
                _changed_heads(written, rewritten),
            )
            assert changes == expected, (head, matrix)
    again, _ = run()
    assert all(torch.equal(before[name], again[name]) for name in names)


@contract
def test_parameters_are_what_the_forward_uses(
    architecture: str, model_folder: ModelFolder, shared_student: Load
) -> None:
    """Every listed parameter moves the logits; their number is that of the plain model."""
    folder = model_folder(architecture)
    student, plain = shared_student(architecture), plain_once(folder)
    parameters = student.parameters()
    tokens, mask = padded(prompts(), "left")
    before = student.final_logits(tokens, mask).detach()
    unmoved = []
    for name, parameter in parameters.items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
            if torch.equal(student.final_logits(tokens, mask), before):
                unmoved.append(name)
            parameter.copy_(kept)
    assert not unmoved
    count = sum(parameter.numel() for parameter in parameters.values())
    tied = (
        plain.get_output_embeddings().weight.numel() if LEGACY and plain.config.tie_word_embeddings else 0
    )  # 3.9 unties
    assert count == sum(parameter.numel() for parameter in plain.parameters()) + tied


@contract
def test_fingerprint_follows_the_weights(load_student: Load) -> None:
    student, other = load_student(), load_student()
    key = student.fingerprint()
    assert key == other.fingerprint()
    part = other.head_slices(Head(2, 3), ("o",))[0]
    with perturbed(other, [part]):
        assert other.fingerprint() != key
    assert other.fingerprint() == key
    assert load_student(seed=1).fingerprint() != key


# --- modes and flags ---


@contract
def test_a_teacher_is_frozen_and_in_eval_mode(architecture: str, shared_teacher: Load) -> None:
    teacher = shared_teacher(architecture)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for _, parameter in teacher.model.named_parameters())
    logits, found = teacher.activations(*unpadded(), [hooks.z(0)], gradients=True)
    assert not logits.requires_grad
    assert not found[hooks.z(0)].requires_grad


@contract
def test_a_student_trains_inside_its_context_only(shared_student: Load) -> None:
    student = shared_student("gpt2")
    assert not student.model.training
    assert all(parameter.requires_grad for parameter in student.parameters().values())
    tokens, mask = unpadded()
    calm = student.final_logits(tokens, mask)
    student.require_eval()

    def train() -> None:
        with torch.random.fork_rng(), student.training():
            assert student.model.training
            with pytest.raises(InputError, match=r"is in training mode; call .eval\(\)"):
                student.require_eval()
            if not LEGACY:  # a HookedTransformer has no dropout
                assert largest(student.final_logits(tokens, mask) - calm) > 100 * CLOSE
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train()
    assert not student.model.training
    assert torch.equal(student.final_logits(tokens, mask), calm)


# --- capture and edit ---


@contract
def test_an_edit_replaces_an_activation_for_all_that_follows(shared_teacher: Load) -> None:
    teacher = shared_teacher()
    tokens, mask = unpadded()
    names = [hooks.z(0), hooks.attention_output(0), hooks.z(1), hooks.residual_post(1)]
    logits, before = teacher.activations(tokens, mask, names)

    def zero(value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    with hooks.edit(teacher.model, {hooks.z(1): zero}):
        edited, after = teacher.activations(tokens, mask, names)
    assert torch.equal(after[hooks.z(0)], before[hooks.z(0)])
    assert not after[hooks.z(1)].any()  # a capture opened after the edit sees the edited value
    assert largest(edited - logits) > 100 * CLOSE
    assert torch.equal(teacher.final_logits(tokens, mask), logits)


@contract
def test_an_edit_to_itself_changes_nothing(architecture: str, shared_teacher: Load) -> None:
    teacher = shared_teacher(architecture)
    tokens, mask = padded(prompts(), "left")
    logits = teacher.final_logits(tokens, mask)
    with hooks.edit(teacher.model, dict.fromkeys(ALL_NAMES, torch.clone)):
        assert torch.equal(teacher.final_logits(tokens, mask), logits)


@contract
def test_nested_edits_see_each_other_in_order(shared_teacher: Load) -> None:
    teacher, seen = shared_teacher(), []
    name = hooks.mlp_output(1)

    def add(amount: float) -> hooks.Edit:
        def change(value: Tensor) -> Tensor:
            seen.append(float(value[0, 0, 0]))
            return value + amount

        return change

    with (
        hooks.edit(teacher.model, {name: add(1.0)}),
        hooks.edit(teacher.model, {name: add(2.0)}),
        hooks.capture(teacher.model, [name]) as found,
    ):
        teacher.final_logits(*unpadded())
    assert seen[1] == pytest.approx(seen[0] + 1)
    assert float(found[name][0, 0, 0]) == pytest.approx(seen[0] + 3)


def hooked_points(model: HookedModel) -> list[str]:
    return [name for name, point in model.model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


@contract
@pytest.mark.parametrize("failing", ["the body", "the edit"])
def test_hooks_and_flags_come_back_after_an_exception(failing: str, shared_teacher: Load) -> None:
    teacher = shared_teacher()
    tokens, mask = unpadded()
    logits = teacher.final_logits(tokens, mask)
    grad = torch.is_grad_enabled()

    def fail(value: Tensor) -> Tensor:
        if failing == "the edit":
            raise RuntimeError("in the edit")
        return value

    def intervene() -> None:
        with hooks.edit(teacher.model, {hooks.z(1): fail}), hooks.capture(teacher.model, [hooks.z(2)]):
            assert hooked_points(teacher)
            teacher.activations(tokens, mask, [hooks.q(0)])
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match=f"in {failing}"):
        intervene()
    assert not hooked_points(teacher)
    assert torch.is_grad_enabled() == grad
    assert torch.equal(teacher.final_logits(tokens, mask), logits)


@contract
def test_a_hook_that_never_fires_raises(shared_teacher: Load) -> None:
    teacher = shared_teacher()
    with (
        pytest.raises(RuntimeError, match=r"never fired: blocks.1.attn.hook_z; was the model run"),
        hooks.capture(teacher.model, [hooks.z(1)]),
    ):
        pass
    with pytest.raises(RuntimeError, match="never fired"), hooks.edit(teacher.model, {hooks.z(1): torch.clone}):
        pass
    assert not hooked_points(teacher)


@contract
def test_an_unknown_hook_name_is_refused_with_the_nearest(shared_teacher: Load) -> None:
    teacher = shared_teacher()
    with pytest.raises(InputError, match=r"no hook 'blocks.1.attn.hook_zz'; did you mean .*'blocks.1.attn.hook_z'"):
        teacher.activations(*unpadded(), ["blocks.1.attn.hook_zz"])
    with (
        pytest.raises(InputError, match=r"no hook 'blocks.7.hook_mlp_out'; did you mean 'blocks.\d.hook_mlp_out'"),
        hooks.edit(teacher.model, {hooks.mlp_output(7): torch.clone}),
    ):
        pass
    assert not hooked_points(teacher)


@contract
def test_an_unknown_head_is_refused_with_the_range(shared_teacher: Load) -> None:
    teacher = shared_teacher()
    for head in (Head(3, 0), Head(0, 4)):
        with pytest.raises(InputError, match=rf"has no head {head}: its layers are 0 to 2, its heads 0 to 3"):
            teacher.checked(head)
        with pytest.raises(InputError, match="has no head"):
            teacher.head_slices(head)
        with pytest.raises(InputError, match="has no head"):
            teacher.of_head(head, hooks.z(head.layer), torch.zeros(1, 1, 4, 8))
    assert teacher.checked(Head(2, 3)) == Head(2, 3)


@contract
def test_an_edit_must_keep_the_shape(shared_teacher: Load) -> None:
    teacher = shared_teacher()
    with (
        pytest.raises(InputError, match=r"turned shape \(3, 9, 4, 8\) into \(3, 4, 8\); return the same shape"),
        hooks.edit(teacher.model, {hooks.z(0): lambda value: value[:, 0]}),
    ):
        teacher.final_logits(*unpadded())
    assert not hooked_points(teacher)


# --- the self-check bites ---


@contract
def test_self_check_compares_the_logits(architecture: str, shared_student: Load) -> None:
    student = shared_student(architecture)
    tokens, mask = padded(prompts(), "left")
    expected = student.model(tokens, attention_mask=mask.long()).detach()
    self_check(student, tokens, mask, expected)
    for layer in range(LAYERS):
        with (
            perturbed(student, student.head_slices(Head(layer, 1), ("o",))),
            pytest.raises(
                InputError, match=r"fails the self-check: its logits differ from transformers' \(largest difference"
            ),
        ):
            self_check(student, tokens, mask, expected)
    self_check(student, tokens, mask, expected)


@contract
@pytest.mark.parametrize("part", ["attention", "pattern"])
def test_self_check_compares_heads_and_patterns(part: str, architecture: str, shared_student: Load) -> None:
    """Each defect is also in the expected logits, so that only its own check can see it."""
    student = shared_student(architecture)
    tokens, mask = padded(prompts(), "left")
    name, message = {
        "attention": (hooks.attention_output(1), "heads' outputs do not sum to the attention output of layer 1"),
        "pattern": (hooks.pattern(1), "attention rows of layer 1 do not sum to 1"),
    }[part]
    with hooks.edit(student.model, {name: lambda value: 1.01 * value}):
        expected = student.model(tokens, attention_mask=mask.long()).detach()
        with pytest.raises(InputError, match=message):
            self_check(student, tokens, mask, expected)


@contract
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_self_check_bites_in_half_precision(dtype: Any, model_folder: ModelFolder) -> None:
    student = Student.load(model_folder("llama"), dtype=dtype)
    tokens, mask = padded(prompts(), "left")
    expected = student.model(tokens, attention_mask=mask.long()).detach()
    self_check(student, tokens, mask, expected)
    with (
        perturbed(student, student.head_slices(Head(1, 1), ("o",))),
        pytest.raises(InputError, match="its logits differ"),
    ):
        self_check(student, tokens, mask, expected)


@contract
def test_loading_a_mis_wired_model_is_refused(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load` compares with is the plain model, not the hooked one."""
    from workbench.models import hooked_model as models

    wire = models.hooked_model

    def mis_wire(*args: Any) -> Any:
        hooked = wire(*args)
        parameter = next(
            parameter for name, parameter in hooked.named_parameters() if "o_proj" in name or "W_O" in name
        )
        parameter.data = parameter.data.flip(0)
        return hooked

    monkeypatch.setattr(models, "hooked_model", mis_wire)
    with pytest.raises(InputError, match="fails the self-check: its logits differ"):
        Teacher.load(model_folder("llama"))
    Teacher.load(model_folder("llama"), check=False)


# --- wrapping a hooked transformer that the user already holds ---


def booted(folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with quiet(), torch.random.fork_rng():  # TransformerLens draws initial weights, which are then replaced
        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


@contract
@pytest.mark.parametrize("compatible", [False, True])
def test_a_users_bridge_is_wrapped(compatible: bool, architecture: str, model_folder: ModelFolder) -> None:
    folder = model_folder(architecture)
    bridge = booted(folder)
    if compatible:
        bridge.enable_compatibility_mode(no_processing=True)
    bridge.train()
    student = Student(bridge, name="mine")
    assert student.model is bridge
    assert not bridge.training
    assert not any(module.training for module in bridge.modules())
    tokens, mask = padded(prompts(), "left")
    logits, found = student.activations(tokens, mask, ALL_NAMES)
    expected, recorded = reference(folder, architecture, tokens, mask)
    assert largest(logits - expected[torch.arange(3), last_position(mask)]) < CLOSE
    for layer in range(LAYERS):
        assert largest((found[hooks.z(layer)] - recorded[hooks.z(layer)])[mask]) < CLOSE
    self_check(student, tokens, mask, expected)
    assert len(
        covered([part for head in student.heads for part in student.head_slices(head)], student.parameters())
    ) == LAYERS * (4 if architecture == "llama" else 7)


@contract
@pytest.mark.parametrize("processing", [{}, {"fold_ln": False}])
def test_a_users_bridge_with_processed_weights_is_refused(
    processing: dict[str, bool], architecture: str, model_folder: ModelFolder
) -> None:
    bridge = booted(model_folder(architecture))
    bridge.enable_compatibility_mode(**processing)
    with pytest.raises(
        InputError,
        match=r"processed \(folded, centered\) weights; load it raw: .*enable_compatibility_mode\(no_processing=True\)",
    ):
        HookedModel(bridge)


def native(**changes: Any) -> Any:
    """A user's own HookedTransformer, not made from a `transformers` model."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # pyright: ignore[reportAttributeAccessIssue]

    settings = {
        "normalization_type": "LN",
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "rotary_dim": D_HEAD,
        **changes,
    }
    cfg = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D_MODEL,
        n_heads=HEADS,
        d_head=D_HEAD,
        d_mlp=64,
        n_ctx=64,
        d_vocab=len(word_tokenizer()),
        act_fn="gelu",
        device="cpu",
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HookedTransformer(cfg, move_to_device=False)


@contract
@legacy_only
def test_a_users_hooked_transformer_is_wrapped_with_its_biases() -> None:
    model = native()
    model.train()
    student = Student(model)
    assert not model.training
    tokens, mask = padded(prompts(), "left")
    logits, found = student.activations(tokens, mask, ALL_NAMES)
    assert found[hooks.k(0)].shape == (*tokens.shape, 2, D_HEAD)
    everywhere = model(tokens, attention_mask=mask.long()).detach()
    assert float((logits - everywhere[:, -1]).abs().max()) <= 1e-5, (
        "unembedding one token alone rounds differently in 3.9, and no more than that"
    )
    assert float((logits - everywhere[:, -2]).abs().max()) >= 1e-3
    self_check(student, tokens, mask, model(tokens, attention_mask=mask.long()))
    counts = covered([part for head in student.heads for part in student.head_slices(head)], student.parameters())
    assert len(counts) == LAYERS * 7
    with pytest.raises(InputError, match="only a student loaded through TransformerBridge"):
        student.save(Path("nowhere"))


@contract
@legacy_only
def test_a_users_hooked_transformer_with_folded_weights_is_refused() -> None:
    model = native()
    model.load_and_process_state_dict(
        model.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    with pytest.raises(InputError, match="from_pretrained_no_processing"):
        HookedModel(model)


@contract
@legacy_only
def test_a_users_hooked_transformer_with_ungrouped_keys_is_refused() -> None:
    model = native()
    model.set_ungroup_grouped_query_attention(True)
    with pytest.raises(InputError, match=r"call set_ungroup_grouped_query_attention\(False\)"):
        HookedModel(model)
    model.set_ungroup_grouped_query_attention(False)
    assert HookedModel(model).n_kv_heads == 2


# --- saving ---


@torch.no_grad()
def disturb(student: Student) -> None:
    """Other weights everywhere, as after a training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters().values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@bridge_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_student_is_an_ordinary_directory_with_the_same_logits(
    architecture: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder, target = model_folder(architecture), tmp_path / "nested" / "student"
    student = Student.load(folder)
    disturb(student)
    tokens, mask = padded(prompts(), "left")
    ours = student.model(tokens, attention_mask=mask.long()).detach()
    student.save(target)
    plain = plain_model(target)
    theirs = plain(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits
    assert largest((ours - theirs)[mask]) < CLOSE
    assert (
        largest(
            (ours - plain_once(folder)(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits)[mask]
        )
        > 1e3 * CLOSE
    )
    assert AutoConfig.from_pretrained(target).architectures == [type(plain).__name__]
    assert {file.suffix for file in target.iterdir()} <= {".json", ".safetensors", ".md"}
    text = "The apple is in Box F ."
    saved, original = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(folder)
    assert saved(text)["input_ids"] == original(text)["input_ids"]
    assert (saved.get_vocab(), saved.special_tokens_map) == (original.get_vocab(), original.special_tokens_map)
    again = Student.load(target)
    assert largest(again.final_logits(tokens, mask) - student.final_logits(tokens, mask)) < CLOSE
    assert again.fingerprint() == student.fingerprint()
    assert [file for file in target.parent.iterdir() if file != target] == []


@bridge_only
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LlamaConfig, {"tie_word_embeddings": True}),
        (LlamaConfig, {"head_dim": 16}),
        (Qwen2Config, {}),  # grouped, with biases on q, k and v
        (GemmaConfig, {"head_dim": 8}),
        (Phi3Config, {}),  # q, k, v in one matrix, the MLP's gate and input in another
        (Phi3Config, {"tie_word_embeddings": True}),
        (MixtralConfig, {"num_local_experts": 4}),
        (Gemma2Config, {"head_dim": 8}),
    ],
)
def test_other_configurations_load_and_save(config: type, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "original", config, **settings)
    student = Student.load(folder)
    disturb(student)
    student.save(tmp_path / "student")
    plain, (tokens, mask) = plain_model(tmp_path / "student"), unpadded()
    assert largest(student.final_logits(tokens, mask) - plain(tokens).logits[:, -1]) < CLOSE
    assert sum(parameter.numel() for parameter in student.parameters().values()) == sum(
        parameter.numel() for parameter in plain.parameters()
    )
    parts = [part for head in student.heads for part in student.head_slices(head)]
    wanted = {
        name: value for name, value in student.parameters().items() if "self_attn" in name and "o_proj.bias" not in name
    }
    assert {name: count.min() > 0 for name, count in covered(parts, student.parameters()).items()} == dict.fromkeys(
        wanted, True
    )


@bridge_only
def test_saving_replaces_a_saved_student_but_no_other_folder(load_student: Load, tmp_path: Path) -> None:
    student = load_student()
    student.save(tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").write_bytes(b"old")
    (tmp_path / "student" / "accuracies.json").write_text("{}")
    student.save(tmp_path / "student")
    assert Student.load(tmp_path / "student").fingerprint() == student.fingerprint()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"has not written .*choose another folder"):
        student.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


@bridge_only
def test_a_student_saves_in_its_dtype_and_keeps_its_modes(model_folder: ModelFolder, tmp_path: Path) -> None:
    student = Student.load(model_folder("neox"), dtype="bfloat16")
    student.save(tmp_path / "student")
    assert AutoConfig.from_pretrained(tmp_path / "student").dtype == torch.bfloat16
    assert not student.model.training
    assert all(parameter.requires_grad for parameter in student.parameters().values())


@contract
@legacy_only
def test_a_hooked_transformer_is_not_saved(load_student: Load, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only a student loaded through TransformerBridge"):
        load_student().save(tmp_path / "student")
    assert not list(tmp_path.iterdir())
