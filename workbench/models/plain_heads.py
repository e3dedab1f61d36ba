"""The heads of a plain `transformers` decoder, as other people's trainers train it: what each puts out, and which
slices of the weights are its own.

The output projection of an attention takes in its heads' outputs side by side, [batch pos (head d_head)]. So a forward
pre-hook on that module reads what TransformerLens calls `hook_z`, under the same name (`hooks.z`), and the model runs
as it always does: in its own dtype, under autocast, checkpointed, wrapped by DDP or an adapter.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.models import hooks, projections, quantisation
from workbench.models.hooked_model import Matrix, WeightSlice
from workbench.values.refs import Head


class Recording:
    """What the forward inside `PlainHeads.recording` was given, and its heads' outputs by hook name."""

    def __init__(self) -> None:
        self.tokens: Int[Tensor, "batch pos"] | None = None
        self.mask: Bool[Tensor, "batch pos"] | None = None
        self.activations: dict[str, Tensor] = {}


class PlainHeads:
    """Head outputs and head slices of a `transformers` decoder (or of a peft model around one)."""

    def __init__(self, model: nn.Module) -> None:
        adapted: Any = model
        plain: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        if not hasattr(plain, "config") or not hasattr(plain, "base_model"):
            raise InputError(
                f"a {type(model).__name__} is neither a transformers model nor a student of the workbench; load it "
                "with AutoModelForCausalLM.from_pretrained(...)."
            )
        config = plain.config.get_text_config()
        self.name = str(getattr(config, "name_or_path", "") or type(plain).__name__)
        self.n_layers, self.n_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.model, self.plain = model, plain
        self._attentions = _attentions(plain, self.name, self.n_layers)
        self.d_head = _width(self.output(0), inputs=True) // self.n_heads

    def output(self, layer: int) -> Any:
        """The output projection of a layer."""
        attention, name = self._attentions[layer]
        return getattr(attention, name)

    def checked(self, head: Head) -> Head:
        """The head, or `InputError` when this model does not have it."""
        if head.layer >= self.n_layers or head.index >= self.n_heads:
            raise InputError(
                f"{self.name} has no head {head}: its layers are 0 to {self.n_layers - 1}, its heads 0 to "
                f"{self.n_heads - 1}."
            )
        return head

    @contextmanager
    def recording(self, layers: Sequence[int]) -> Iterator[Recording]:
        """Record tokens, mask and the heads' outputs of some layers in the forward inside the context, in its autograd
        graph.

        Of several forwards a later one counts only if it builds a graph. Errors: `InputError` when none ran, and for
        packed prompts.
        """
        record = Recording()
        with ExitStack() as opened:
            base: nn.Module = self.plain.base_model
            opened.callback(base.register_forward_pre_hook(partial(_record_input, record), with_kwargs=True).remove)
            for layer in layers:
                keep = partial(_record_heads, record, hooks.z(layer), self.n_heads)
                opened.callback(self.output(layer).register_forward_pre_hook(keep).remove)
            yield record
        silent = [layer for layer in layers if hooks.z(layer) not in record.activations]
        if record.tokens is None or silent:
            raise InputError(
                f"no forward of {self.name} ran where its heads' outputs were to be read; give the model that the "
                "trainer trains."
            )

    def activations(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Heads' outputs by hook name from a forward of its own, in the autograd graph where gradients are enabled."""
        with self.recording([layer for layer in range(self.n_layers) if hooks.z(layer) in names]) as record:
            self.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        return record.activations

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of every head of a layer, in the autograd graph. Errors: `InputError` where an adapter or a quantisation
        stands between the weight and what the layer computes."""
        weight, inputs_first = _matrix(self.output(layer), self.name)
        return (weight if inputs_first else weight.T).unflatten(0, (self.n_heads, self.d_head))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name."""
        return dict(self.model.named_parameters())

    def head_slices(self, head: Head, matrices: Sequence[Matrix] = ("q", "k", "v", "o")) -> list[WeightSlice]:
        """The parts of the parameters that belong to a head, as `HookedModel.head_slices`.

        Of a peft model they are the parts of its LoRA factors that move the head's own slices: of W_Q, W_K, W_V the
        rows of B, of W_O the columns of A, and the other factor whole, which the heads of a layer share. What is not
        adapted does not train. Errors: `InputError` for an attention that stores its queries, keys and values in no
        known way, and for a peft model that adapts none of a head's matrices.
        """
        self.checked(head)
        named = {id(parameter): name for name, parameter in self.model.named_parameters()}
        of_matrix = self._slices if self.model is self.plain else self._adapter_slices
        parts = [part for matrix in matrices for part in of_matrix(head, matrix, named)]
        if not parts:
            raise InputError(
                f"the adapter of {self.name} changes no matrix of {head}; name its projections in LoraConfig's "
                "target_modules."
            )
        return parts

    @torch.no_grad()
    def confine_adapter(self, heads: Sequence[Head]) -> None:
        """Clear what a peft model's fresh LoRA factors of W_O would write into other heads' columns: with B at its
        start, 0, the model stays what it is. Without an adapter, nothing. Errors: `InputError` for a trained adapter of
        W_O that is not these heads' alone."""
        for layer in sorted({head.layer for head in heads}):
            factors = _factors(self.output(layer))
            if factors is None:
                continue
            own = torch.zeros(factors[0].shape[1], dtype=torch.bool, device=factors[0].device)
            for head in heads:
                if head.layer == layer:
                    own[head.index * self.d_head : (head.index + 1) * self.d_head] = True
            if bool(factors[1].any()) and bool(factors[0][:, ~own].any()):
                raise InputError(
                    f"the adapter of layer {layer}'s output projection is trained, and on other heads too; begin with "
                    "a fresh one, or leave `heads` out."
                )
            factors[0][:, ~own] = 0

    def _adapter_slices(self, head: Head, matrix: Matrix, named: dict[int, str]) -> Iterator[WeightSlice]:
        module, start = self._place(head, matrix)
        where = slice(start, start + self.d_head)
        if (factors := _factors(module)) is not None:
            down, up = (named[id(factor)] for factor in factors)
            yield WeightSlice(parameter=down, index=(slice(None), where) if matrix == "o" else ())
            yield WeightSlice(parameter=up, index=() if matrix == "o" else (where,))

    def _slices(self, head: Head, matrix: Matrix, named: dict[int, str]) -> Iterator[WeightSlice]:
        module, start = self._place(head, matrix)
        weight, inputs_first = _matrix(module, self.name)
        where = slice(start, start + self.d_head)
        first = inputs_first == (matrix == "o")
        yield WeightSlice(
            parameter=named[id(weight)], index=(where,) if first else (slice(None), where), inputs_first=inputs_first
        )
        if matrix != "o" and module.bias is not None:
            yield WeightSlice(parameter=named[id(module.bias)], index=(where,))

    def _place(self, head: Head, matrix: Matrix) -> tuple[Any, int]:
        """The module of a head's queries, keys or values, and where its part of the module's output begins; of the
        output projection, of its input."""
        if matrix == "o":
            return self.output(head.layer), head.index * self.d_head
        attention, _ = self._attentions[head.layer]
        number = "qkv".index(matrix)
        own = head.index if matrix == "q" else head.index // (self.n_heads // self.n_kv_heads)
        widths = [count * self.d_head for count in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        if all(hasattr(attention, name) for name in projections.SEPARATE):
            return self._of_width(getattr(attention, projections.SEPARATE[number]), widths[number]), own * self.d_head
        for name in projections.SIDE_BY_SIDE:
            if hasattr(attention, name):
                module = self._of_width(getattr(attention, name), sum(widths))
                return module, sum(widths[:number]) + own * self.d_head
        for name in projections.INTERLEAVED:
            if hasattr(attention, name) and self.n_kv_heads == self.n_heads:
                return self._of_width(getattr(attention, name), sum(widths)), (3 * own + number) * self.d_head
        raise self._unknown(attention)

    def _of_width(self, module: Any, width: int) -> Any:
        if _width(module, inputs=False) != width:
            raise self._unknown(module)
        return module

    def _unknown(self, module: nn.Module) -> InputError:
        return InputError(
            f"don't know which rows of {type(module).__name__} in {self.name} belong to which head; train the whole "
            "model, or adapters."
        )


def _attentions(plain: nn.Module, name: str, layers: int) -> list[tuple[nn.Module, str]]:
    """The attention of each layer, and what its output projection is called there."""
    known = [
        (module, output)
        for path, module in plain.named_modules()
        for output in projections.OUTPUT.get(path.rpartition(".")[2], ())
        if isinstance(getattr(module, output, None), nn.Module)
    ]
    if len(known) != layers:
        raise InputError(
            f"{name} has {layers} layers, and an output projection of attention was found in {len(known)} of them, "
            "under the names "
            f"{', '.join(sorted({each for names in projections.OUTPUT.values() for each in names}))}; its heads can't "
            "be read. Load it as a Student."
        )
    return known


def _width(module: Any, *, inputs: bool) -> int:
    """How many features a Linear, a Conv1D or an adapter of one takes in, or puts out."""
    width = getattr(module, "in_features" if inputs else "out_features", None)
    return int(getattr(module, "nx" if inputs else "nf") if width is None else width)


def _factors(module: Any) -> tuple[nn.Parameter, nn.Parameter] | None:
    """(A, B) of the LoRA layer that peft trains in a projection's place; None where it trains none.

    Errors: `InputError` for several at once.
    """
    active = [each for each in getattr(module, "active_adapters", ()) if each in getattr(module, "lora_A", ())]
    if len(active) > 1:
        raise InputError(f"the adapters {', '.join(active)} are active at once; activate one: model.set_adapter(name).")
    return (module.lora_A[active[0]].weight, module.lora_B[active[0]].weight) if active else None


def _matrix(module: Any, name: str) -> tuple[nn.Parameter, bool]:
    """A projection's weight, and whether its first axis is the input's (Conv1D) rather than the output's (Linear)."""
    conv = type(module).__name__ == "Conv1D"
    if (not conv and type(module) is not nn.Linear) or quantisation.is_quantised(module.weight):
        raise InputError(
            f"{name} computes a projection with {type(module).__name__}, whose weight is not a matrix of its own; "
            "align `z`, and train it as it is."
        )
    weight: Any = module.weight
    return weight, conv


def _record_heads(record: Recording, name: str, heads: int, _: nn.Module, arguments: tuple[Any, ...]) -> None:
    if name not in record.activations or torch.is_grad_enabled():
        record.activations[name] = arguments[0].unflatten(-1, (heads, -1))


def _record_input(record: Recording, base: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if record.tokens is not None and not torch.is_grad_enabled():
        return
    given = inspect.signature(base.forward).bind_partial(*arguments, **named).arguments
    given = {**given, **given.get("kwargs", {})}
    tokens, mask, numbers = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not isinstance(tokens, Tensor):
        raise InputError("the model was run on embeddings, so its prompts are not known; run it on input_ids.")
    if mask is None and isinstance(numbers, Tensor) and int((numbers == 0).sum()) > len(tokens):
        raise InputError("several prompts are packed in one row; set packing=False and padding_free=False.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
        raise InputError("the attention mask is not [batch pos], so padding can't be told; give the tokenizer's own.")
    record.tokens = tokens
    record.mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
