"""The models as everything above sees them: load or wrap one, get activations by hook name and by head, address a
head's own weights.

Everything above is written against `HookedModel`. Loading runs `self_check`, which refuses a mis-wired model.
"""

import copy
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_args
from weakref import WeakKeyDictionary

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench import seeds, storage
from workbench.errors import InputError, nearest
from workbench.models import folders, hooks, quantisation, sources
from workbench.models.devices import DeviceMap, require_device, require_device_map
from workbench.models.quantisation import Quantisation
from workbench.models.transformer_lens import HookedTransformerLike, hooked_model, refuse_unfit
from workbench.values.refs import Head

if TYPE_CHECKING:
    from workbench.models.card import StudentDescription

Matrix = Literal["q", "k", "v", "o"]
Dtype = Literal["float32", "float64", "bfloat16", "float16", "auto"]
"""`auto`: as the weights were saved."""
FUSED = re.compile(r"\.qkv\.|\.gate_up_proj\.")
"""Matrices that a bridge has split, and no longer uses: of queries, keys and values, and of an MLP's gate and input."""
Loaded = TypeVar("Loaded", bound="HookedModel")
_FINGERPRINTS: "WeakKeyDictionary[HookedModel, tuple[str, str]]" = WeakKeyDictionary()
"""A checksum of a model's weights, and the fingerprint that was taken of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlice:
    """A part of a named parameter: `parameter[index]`."""

    parameter: str
    index: tuple[slice | int, ...]
    inputs_first: bool = False
    """Of a matrix: whether its first axis is the input's, and the output is `x @ W` rather than `x @ W.T`."""


class HookedModel:
    """A hooked decoder in eval mode, with activations by name and by head.

    `model` is the hooked transformer itself, for whatever this wrapper does not offer.
    """

    quantisable: ClassVar[bool] = True
    """Whether its weights may be quantised: those of a model that trains may not."""

    def __init__(self, model: HookedTransformerLike, *, name: str = "model") -> None:
        refuse_unfit(model)
        if not self.quantisable:
            _refuse_quantised(model, name)
        if hasattr(model, "enable_compatibility_mode") and not getattr(model, "compatibility_mode", False):
            cast(Any, model).enable_compatibility_mode(no_processing=True)
        self.model = model
        self.name = name
        self.tokenizer: Any = model.tokenizer
        self.context = _context(model.cfg)
        self._parameter_names = {id(parameter): key for key, parameter in model.named_parameters()}
        model.eval()

    @classmethod
    def load(
        cls: type[Loaded],
        source: str | Path,
        *,
        device: str = "cpu",
        dtype: Dtype | str = "float32",
        check: bool = True,
        quantisation: Quantisation | str | None = None,
        device_map: DeviceMap | None = None,
    ) -> Loaded:
        """Load a bundled model by its name (`teacher`, `student`, ...), or from a hub id, a Hugging Face directory, a
        PEFT/LoRA adapter directory (merged) or a GGUF file.

        `dtype`: `auto` for that in which the weights were saved. `check=False` skips the self-check (it costs a forward
        of the plain model; skip it for a model loaded before; a GGUF file that has passed it is not checked again).
        `quantisation`: hold the matrices of a teacher in 8 or 4 bits (`workbench.models.quantisation`); a folder that
        holds such weights needs no setting. `device_map`: where the parts of the model lie, in place of `device`: a
        device, `{part: device}`, or how to spread it over several (`auto`, `balanced`), as `accelerate` takes it.
        Errors: `InputError` when the source can't be had or the hooked model does not equal the plain one, for a device
        or a dtype that there is not, and for a student of quantised weights.
        """
        placing = _placing(cls.quantisable, device, quantisation, device_map)
        opened = sources.open_source(source, dtype=_dtype_named(dtype), placing=placing)
        tokens, mask = _probe(opened.model.get_input_embeddings().weight.shape[0], _context(opened.model.config))
        expected = None
        where = opened.model.get_input_embeddings().weight.device
        tokens, mask = tokens.to(where), mask.to(where)
        how = f"{opened.dtype} on {where.type}"
        if check and (opened.placed or not sources.has_passed(opened.directory, how)):
            remedy = "compare its config.json with that of the model that it was made from"
            with torch.no_grad(), folders.refusing(f"{source} does not run in `transformers` in {dtype}", remedy):
                expected = opened.model(tokens, attention_mask=mask.long(), position_ids=_position_ids(mask)).logits
        if expected is not None and not bool(expected[mask].isfinite().all()):
            raise InputError(
                f"{source} has no finite logits on a padded batch in {dtype}, in `transformers` itself; load it in "
                "float32."
            )
        hooked = hooked_model(opened, str(where) if opened.placed else device)
        loaded = cls(hooked, name=str(source))
        loaded.tokenizer = (
            opened.tokenizer
        )  # TransformerLens' own copy adds a BOS token and names missing special tokens
        loaded.context = _context(opened.model.config)
        if expected is not None:
            with folders.refusing(
                f"{source} does not run in TransformerLens", "compare its config.json with the weights"
            ):
                self_check(loaded, tokens, mask, expected)
            if not opened.placed:
                sources.note_passed(opened.directory, how)
        return loaded

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.model.cfg.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.model.cfg.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads per layer: fewer than `n_heads` with grouped-query attention."""
        return self.model.cfg.n_key_value_heads or self.model.cfg.n_heads

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.model.cfg.d_head

    @property
    def has_parallel_blocks(self) -> bool:
        """Whether attention and MLP of a block read the same residual stream (NeoX), rather than one after the
        other."""
        return bool(getattr(self.model.cfg, "parallel_attn_mlp", False))

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm stands between attention (or the MLP) and the residual stream, as in Gemma 2 and OLMo 2: what
        the heads write does not add up there."""
        return any(name in dict(self.model.blocks[0].named_children()) for name in ("ln1_post", "ln2_post"))

    @property
    def has_sinks(self) -> bool:
        """Whether a share of the attention goes to no token (gpt-oss)."""
        return hasattr(getattr(self.model.blocks[0].attn, "original_component", None), "sinks")

    @property
    def d_vocab(self) -> int:
        """Number of logits."""
        return self.model.cfg.d_vocab

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(parameter for _, parameter in self.model.named_parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of every weight that is not quantised."""
        kinds = (parameter for _, parameter in self.model.named_parameters())
        return next(kind.dtype for kind in kinds if not quantisation.is_quantised(kind))

    @property
    def is_spread(self) -> bool:
        """Whether the weights lie on several devices."""
        return len({parameter.device for _, parameter in self.model.named_parameters()}) > 1

    @property
    def heads(self) -> list[Head]:
        """Every head, layer by layer."""
        return [Head(layer, index) for layer in range(self.n_layers) for index in range(self.n_heads)]

    def checked(self, head: Head) -> Head:
        """The head, or `InputError` when this model does not have it."""
        if head.layer >= self.n_layers or head.index >= self.n_heads:
            raise InputError(
                f"{self.name} has no head {head}: its layers are 0 to {self.n_layers - 1}, its heads 0 to "
                f"{self.n_heads - 1}."
            )
        return head

    def kv_head(self, head: Head) -> int:
        """The key-value head that a query head reads."""
        return head.index // (self.n_heads // self.n_kv_heads)

    def require_eval(self) -> None:
        """Raise `InputError` in training mode, where dropout would blur an intervention."""
        if self.model.training:
            raise InputError(f"{self.name} is in training mode; call .eval() before patching, ablating or evaluating.")

    def require_prompts(self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> None:
        """Refuse prompts that are longer than the model's context, tokens that it has no embedding of (padding too),
        and a mask of other prompts. Errors: `InputError`."""
        if tokens.is_meta:
            return
        if tokens.shape != mask.shape:
            raise InputError(
                f"tokens of shape {tuple(tokens.shape)} have a mask of shape {tuple(mask.shape)}: clean and corrupt "
                "prompts differ in length, and what was asked for needs every token's counterpart; ask it of prompts "
                "of equal length, or patch, ablate or interchange at positions that both name."
            )
        if self.context is not None and tokens.shape[1] > self.context:
            longest = int(mask.sum(1).max())
            if longest > self.context:
                raise InputError(
                    f"a prompt has {longest} tokens, and {self.name} reads {self.context}; shorten the prompts, or "
                    "take a "
                    "model with a longer context."
                )
        rows = self.embeddings
        highest = int(tokens.max()) if tokens.numel() else 0
        if highest >= rows:
            row, column = divmod(int(tokens.argmax()), tokens.shape[1])
            what = "" if bool(mask[row, column]) else " (padding)"
            raise InputError(
                f"prompt {row} has the token {highest}{what}, and {self.name} has {rows} embeddings; make the prompts "
                "with "
                "the model's own tokenizer, and pad with a token that it has."
            )

    @property
    def embeddings(self) -> int:
        """How many tokens the model has an embedding of."""
        embed: Any = getattr(self.model, "embed", None)
        weight = getattr(getattr(embed, "original_component", embed), "weight", getattr(embed, "W_E", None))
        return self.d_vocab if weight is None else int(weight.shape[0])

    def final_logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the last real token of each prompt, the only ones that are computed. `mask` is True on real tokens
        (left or right padding)."""
        self.require_prompts(tokens, mask)
        with hooks.locked(self.model), _only_last(self.model.unembed, mask):
            logits = self.model(
                tokens, attention_mask=mask.long()
            )  # also when all are real: 3.9 would guess the padding from the tokens
        return logits[:, 0]

    def last_logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], columns: int
    ) -> Float[Tensor, "batch column d_vocab"]:
        """Logits at the last columns, real tokens or not, the only ones that are computed: what predicts the tokens of
        answers that were appended (`workbench.tasks.forcing`)."""
        self.require_prompts(tokens, mask)
        with hooks.locked(self.model), _only_columns(self.model.unembed, columns):
            return self.model(tokens, attention_mask=mask.long())

    def activations(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        names: Sequence[str],
        *,
        gradients: bool = False,
        columns: int | None = None,
    ) -> tuple[Float[Tensor, "batch *column d_vocab"], dict[str, Tensor]]:
        """Final logits and activations by hook name; with `gradients=True` both stay in the autograd graph. `columns`:
        logits as `last_logits` in place of those at the last real token."""
        with torch.set_grad_enabled(gradients), hooks.capture(self.model, names, detach=not gradients) as captured:
            logits = self.final_logits(tokens, mask) if columns is None else self.last_logits(tokens, mask, columns)
        return logits, captured

    @torch.no_grad()
    def early_activations(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Activations by hook name from a forward that ends where the last of them is computed."""
        self.require_prompts(tokens, mask)
        with hooks.capture_and_stop(self.model, names) as captured:
            self.model(tokens, attention_mask=mask.long())
        return captured

    def of_head(self, head: Head, name: str, activation: Tensor) -> Tensor:
        """A head's own part of an activation captured under `name`.

        z, q -> [batch pos d_head]; k, v -> its key-value group's [batch pos d_head]; pattern -> [batch query_pos
        key_pos].
        """
        self.checked(head)
        if name in (hooks.z(head.layer), hooks.q(head.layer)):
            return activation[:, :, head.index]
        if name in (hooks.k(head.layer), hooks.v(head.layer)):
            return activation[:, :, self.kv_head(head)]
        if name == hooks.pattern(head.layer):
            return activation[:, head.index]
        raise InputError(
            f"{name!r} is not an activation that belongs to {head}; capture z, q, k, v or the pattern of layer "
            f"{head.layer}."
        )

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of every head of a layer, in the autograd graph."""
        weight, inputs_first = self._weight(layer, "o")
        weight = quantisation.full(weight)
        if weight.ndim == 3:
            return weight
        return (weight if inputs_first else weight.T).unflatten(0, (self.n_heads, self.d_head))

    def head_outputs(
        self, layer: int, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_model"]:
        """What each head of a layer writes to the residual stream (without the layer's output bias)."""
        return einsum(
            z, self.output_weights(layer), "batch pos head d_head, head d_head d_model -> batch pos head d_model"
        )

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """b_O of a layer, or None."""
        attention = self.model.blocks[layer].attn
        return attention.o.original_component.bias if hasattr(attention, "o") else attention.b_O

    def head_slices(self, head: Head, matrices: Sequence[Matrix] = ("q", "k", "v", "o")) -> list[WeightSlice]:
        """The parts of the parameters that belong to a head: its rows of W_Q, W_K, W_V with their biases and its
        columns of W_O.

        With grouped-query attention `k` and `v` are the whole group's, shared with its other query heads. b_O belongs
        to no head.
        """
        self.checked(head)
        return [part for matrix in matrices for part in self._slices(head, matrix)]

    def _slices(self, head: Head, matrix: Matrix) -> Iterator[WeightSlice]:
        weight, inputs_first = self._weight(head.layer, matrix)
        index = self.kv_head(head) if matrix in ("k", "v") else head.index
        if weight.ndim == 3:
            yield WeightSlice(parameter=self._parameter_names[id(weight)], index=(index,), inputs_first=True)
            bias = self._legacy_parameter(head.layer, f"b_{matrix.upper()}") if matrix != "o" else None
            if bias is not None:
                yield WeightSlice(parameter=self._parameter_names[id(bias)], index=(index,))
            return
        rows = slice(index * self.d_head, (index + 1) * self.d_head)
        first = inputs_first == (matrix == "o")
        yield WeightSlice(
            parameter=self._parameter_names[id(weight)],
            index=(rows,) if first else (slice(None), rows),
            inputs_first=inputs_first,
        )
        bias = getattr(self.model.blocks[head.layer].attn, matrix).original_component.bias
        if matrix != "o" and bias is not None:
            yield WeightSlice(parameter=self._parameter_names[id(bias)], index=(rows,))

    def _weight(self, layer: int, matrix: Matrix) -> tuple[nn.Parameter, bool]:
        """A projection's parameter and whether its first axis is the input's (Conv1D) rather than the output's
        (Linear)."""
        legacy = self._legacy_parameter(layer, f"W_{matrix.upper()}")
        if legacy is not None:
            return legacy, True
        component = getattr(self.model.blocks[layer].attn, matrix).original_component
        return component.weight, type(component).__name__ == "Conv1D"

    def _legacy_parameter(self, layer: int, name: str) -> nn.Parameter | None:
        """A parameter of a `HookedTransformer` block, where grouped keys and values are stored under `_W_K`, `_W_V`."""
        parameters = getattr(self.model.blocks[layer].attn, "_parameters", {})
        return parameters.get(f"_{name}", parameters.get(name))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that the forward uses, by name (a fused matrix that the bridge has split is not among
        them)."""
        return {name: parameter for name, parameter in self.model.named_parameters() if not FUSED.search(name)}

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all parameters: the key of anything computed with this model. It is taken
        anew where a checksum over the same says that they are not those of the last time."""
        parts = [
            part
            for name, value in sorted(self.parameters().items())
            for part in (f"{name}{tuple(value.shape)}{value.dtype}", quantisation.full(value))
        ]
        seen = storage.checksum(*parts)
        if _FINGERPRINTS.get(self, ("", ""))[0] != seen:
            _FINGERPRINTS[self] = (seen, storage.digest(*parts, separator=""))
        return _FINGERPRINTS[self][1]


class Teacher(HookedModel):
    """A frozen model in eval mode: no parameter takes a gradient."""

    def __init__(self, model: HookedTransformerLike, *, name: str = "teacher") -> None:
        super().__init__(model, name=name)
        for _, parameter in model.named_parameters():
            parameter.requires_grad_(False)


class Student(HookedModel):
    """A model that trains; it comes up in eval mode and can be saved as an ordinary Hugging Face directory."""

    quantisable = False

    description: "StudentDescription | None" = None
    """What its model card says of it, besides where it comes from; whoever trains it sets it."""

    def copy(self) -> "Student":
        """Another student of the same weights; training one leaves the other as it is."""
        held = (value for module in cast(nn.Module, self.model).modules() for value in vars(module).values())
        # TransformerBridge keeps some of the last forward, with its graph; every forward sets it anew
        transient = {id(value): None for value in held if isinstance(value, Tensor) and not value.is_leaf}
        other = type(self)(copy.deepcopy(self.model, transient), name=self.name)
        other.tokenizer = self.tokenizer
        other.context = self.context
        other.description = self.description
        return other

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode (dropout on) inside the context, eval mode after it."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def save(self, directory: str | Path) -> None:
        """Write a Hugging Face directory (config, safetensors, tokenizer, model card) that `transformers` loads to the
        same logits; beside them the circuits and the head map that a student was distilled with.

        A model that this program saved there before is replaced. Errors: `InputError` for a hooked transformer that was
        not made from a `transformers` model, and for a directory that holds anything that this program has not written.
        """
        from workbench.models.export import plain_model, save_plain

        directory = Path(directory)
        storage.require_replaceable(directory)
        plain, card = plain_model(self.model), self.card()

        def fill(temporary: Path) -> None:
            save_plain(plain, self.tokenizer, temporary)
            storage.write_text(temporary / "README.md", card)
            for name, value in ({} if self.description is None else self.description.files).items():
                storage.write_json(temporary / name, value)

        storage.replace_directory(directory, fill)

    def card(self) -> str:
        """The model card: what was trained, its results where they are known, circuits, recipe, commit, licences."""
        from workbench.models.card import StudentDescription, model_card

        return str(model_card(self.description or StudentDescription(base=self.name)))

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Put what `save` writes into a hub repository (`owner/name`), made where there is none; returns its address.

        `token`: None = the one that `hf auth login` has stored. Errors: `InputError` for what `save` refuses, and for
        a hub that can't be reached or does not let you write.
        """
        from workbench.storage.hub import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "student")
            return push_folder(Path(folder) / "student", repository, private=private, token=token)


@contextmanager
def _only_last(unembed: nn.Module, mask: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Unembed the last real token of each prompt alone: of a small model with a large vocabulary that is a third of a
    forward, and most of its memory."""
    rows, last = torch.arange(len(mask), device=mask.device), last_position(mask)
    handle = unembed.register_forward_pre_hook(lambda _, arguments: (arguments[0][rows, last][:, None], *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _only_columns(unembed: nn.Module, columns: int) -> Iterator[None]:
    """Unembed the last columns alone."""
    handle = unembed.register_forward_pre_hook(lambda _, arguments: (arguments[0][:, -columns:], *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()


def last_position(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Index of the last real token of each prompt."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def _position_ids(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _probe(vocabulary: int, context: int | None) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Two random prompts, the second left-padded, for the self-check."""
    length = min(12, context or 12)
    tokens = torch.randint(0, vocabulary, (2, length), generator=seeds.generator(0, "self-check"))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 3] = False
    return tokens, mask


def _context(config: Any) -> int | None:
    """How many positions a model reads, where its config says so."""
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    values = (getattr(inner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _placing(
    quantisable: bool, device: str, quantised: Quantisation | str | None, device_map: DeviceMap | None
) -> folders.Placing:
    """Where and in how many bits a model is to be held. Errors: `InputError` for what can't be, before it is loaded."""
    require_device(device)
    if device_map is not None:
        if torch.device(device).type != "cpu":
            raise InputError(f"device {device!r} and a device_map say where the model lies; give one of the two.")
        require_device_map(device_map)
    name = None if quantised is None else quantisation.quantisation_named(quantised)
    if name is not None and not quantisable:
        raise InputError(f"{quantisation.TRAINS}; {quantisation.REMEDY}.")
    return folders.Placing(quantisation=name, stored=quantisable, device=device, device_map=device_map)


def _refuse_quantised(model: HookedTransformerLike, name: str) -> None:
    quantised = next((key for key, value in model.named_parameters() if quantisation.is_quantised(value)), None)
    if quantised is not None:
        raise InputError(f"{name} holds {quantised} in fewer bits, and {quantisation.TRAINS}; {quantisation.REMEDY}.")


def _dtype_named(dtype: str) -> torch.dtype | None:
    known = get_args(Dtype)
    if dtype not in known:
        raise InputError(
            f"the dtype is {dtype!r}, and it must be one of {', '.join(known)}; {nearest(str(dtype), known)}"
        )
    return None if dtype == "auto" else getattr(torch, dtype)


def self_check(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    expected: Float[Tensor, "batch pos d_vocab"],
) -> None:
    """Refuse a mis-wired model: logits equal `transformers`, head outputs plus bias equal what attention puts out,
    attention rows sum to 1 (to less where attention sinks take the rest).

    Errors: `InputError` naming the check and the largest difference. Tolerances: rounding of the model's dtype.
    """
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    scaled = getattr(model.model.blocks[0], "residual_contribution_scale", 1.0) != 1.0
    together = hooks.attention_sum if model.has_post_norms or scaled else hooks.attention_output
    names = [name(layer) for layer in range(model.n_layers) for name in (hooks.z, together, hooks.pattern)]
    with torch.no_grad(), hooks.capture(model.model, names) as captured:
        logits = model.model(tokens, attention_mask=mask.long())
    _refuse_difference(model, "its logits differ from transformers'", logits[mask], expected.to(model.device)[mask])
    for layer in range(model.n_layers):
        written = model.head_outputs(layer, captured[hooks.z(layer)]).sum(2)
        bias = model.output_bias(layer)
        written = written if bias is None else written + bias
        _refuse_difference(
            model,
            f"its heads' outputs do not sum to the attention output of layer {layer}",
            written[mask],
            captured[together(layer)][mask],
        )
        rows = captured[hooks.pattern(layer)].sum(-1).transpose(1, 2)[mask]
        if model.has_sinks:
            rows = rows.clamp(min=1.0)
        _refuse_difference(model, f"its attention rows of layer {layer} do not sum to 1", rows, torch.ones_like(rows))


def _refuse_difference(model: HookedModel, what: str, actual: Tensor, expected: Tensor) -> None:
    precision = min(
        1e3 * torch.finfo(actual.dtype).eps, 0.1
    )  # at most a tenth: 1,000 roundings of bfloat16 would excuse anything
    actual, expected = actual.detach(), expected.detach()
    difference = float((actual - expected).abs().max())
    allowed = precision * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise InputError(
            f"{model.name} fails the self-check: {what} (largest difference {difference:.2e}, allowed {allowed:.2e}). "
            "This architecture is not supported exactly by the installed TransformerLens; try another version, or "
            "`transformers` eager attention."
        )
