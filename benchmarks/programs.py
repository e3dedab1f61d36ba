"""Circuits known from outside: RASP programs compiled with tracr (Lindner et al. 2023), as models of ours.

`assets/programs/compile.py` wrote the weights. A compiled transformer has no norms; GPT-2 has, so each is given its own
mirror image (mean zero) and a ballast that dominates the norm's scale, which leaves the norm the identity to 1e-4. What
is wired is read off the weights: an edge is in the circuit where the sender writes, on some prompt, otherwise than on
the corrupt one into a direction that the receiver reads (`changing`), or where it writes into one at all (`wired`:
directions that are the same on all prompts too, of which no patching can tell).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from workbench import seeds, storage
from workbench.circuits.recovery import auroc, node_scores
from workbench.models.hooked_model import Teacher
from workbench.models.sources import quiet
from workbench.patching.attribution import Edges, attribute_edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.edge_gradients import Sent
from workbench.patching.execution import Execution
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.scores import Scores

FOLDER = Path(__file__).parents[1] / "assets" / "programs"
NAMES = ("xproportion", "reverse", "induction", "histogram", "pattern")
BALLAST, HEAVY = 16, 300.0
PROMPTS = 48
QUIET = Execution(progress=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A compiled program: its model, pairs whose answers differ, and its circuit."""

    name: str
    described: dict[str, Any]
    model: Teacher
    pairs: PromptPairs
    wired: Tensor
    changing: Tensor


def load(name: str) -> Program:
    """The model, pairs and truth of a program."""
    weights, described = (
        storage.read_tensors(FOLDER / f"{name}.safetensors")[0],
        storage.read_json(FOLDER / f"{name}.json"),
    )
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), weights, described)
        model = Teacher.load(Path(folder))
    pairs = _pairs(name, described, model)
    reads = _reads(weights, described)
    wired, changing = (
        _joined(model, writes, reads) for writes in (_writes(weights, described), _changes(model, pairs))
    )
    return Program(name=name, described=described, model=model, pairs=pairs, wired=wired, changing=changing)


def tokens_of(described: dict[str, Any], sequence: list[str]) -> list[int]:
    """BOS and the letters, as the model counts them."""
    return [described["tokens"][token] for token in ("BOS", *sequence)]


def _outputs(described: dict[str, Any]) -> dict[str, int]:
    """Word of the answer -> direction of the residual stream that says it."""
    output = described["output"]
    return {"value": output[0], "nothing": -1} if isinstance(output, list) else output


def _write(folder: Path, weights: dict[str, Tensor], described: dict[str, Any]) -> None:
    """A GPT-2 directory that computes the program."""
    size, heads, key = len(described["labels"]), described["heads"], described["key_size"]
    width, inputs, outputs = 2 * size + BALLAST, len(described["tokens"]), _outputs(described)
    width += -width % heads
    words = {**described["tokens"], **{f"={word}": inputs + place for place, word in enumerate(outputs)}}
    config = GPT2Config(
        vocab_size=len(words),
        n_embd=width,
        n_layer=described["layers"],
        n_head=heads,
        n_inner=described["mlp_size"],
        n_positions=described["length"],
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=words["compiler_pad"],
    )
    with torch.random.fork_rng(), torch.no_grad(), quiet():
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.zero_()
        body = model.transformer
        body.wte.weight[:inputs, : 2 * size] = _mirrored(weights["token_embed/embeddings"][:inputs])
        body.wpe.weight[:, : 2 * size] = _mirrored(weights["pos_embed/embeddings"][: described["length"]])
        body.wpe.weight[:, 2 * size : 2 * size + BALLAST] = HEAVY * torch.tensor([1.0, -1.0]).repeat(BALLAST // 2)
        usual = (BALLAST * HEAVY**2 / width) ** 0.5
        for norm in [body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(usual)
        d_head = width // heads
        for layer, block in enumerate(body.h):
            part = f"transformer/layer_{layer}"
            for place, kind in enumerate(("query", "key", "value")):
                scale = (d_head / key) ** 0.5 if kind == "query" else 1.0
                for head in range(heads):
                    columns = slice(place * width + head * d_head, place * width + head * d_head + key)
                    own = slice(head * key, (head + 1) * key)
                    block.attn.c_attn.weight[:size, columns] = scale * weights[f"{part}/attn/{kind}/w"][:, own]
                    block.attn.c_attn.bias[columns] = scale * weights[f"{part}/attn/{kind}/b"][own]
            for head in range(heads):
                out = weights[f"{part}/attn/linear/w"][head * key : (head + 1) * key]
                block.attn.c_proj.weight[head * d_head : head * d_head + key, : 2 * size] = _mirrored(out)
            block.attn.c_proj.bias[: 2 * size] = _mirrored(weights[f"{part}/attn/linear/b"])
            block.mlp.c_fc.weight[:size] = weights[f"{part}/mlp/linear_1/w"]
            block.mlp.c_fc.bias.copy_(weights[f"{part}/mlp/linear_1/b"])
            block.mlp.c_proj.weight[:, : 2 * size] = _mirrored(weights[f"{part}/mlp/linear_2/w"])
            block.mlp.c_proj.bias[: 2 * size] = _mirrored(weights[f"{part}/mlp/linear_2/b"])
        for place, direction in enumerate(outputs.values()):
            if direction >= 0:
                model.lm_head.weight[inputs + place, direction] = 1.0
        model.save_pretrained(folder)
        tokenizer = Tokenizer(WordLevel(words, unk_token="compiler_pad"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="compiler_pad").save_pretrained(folder)


def _mirrored(value: Tensor) -> Tensor:
    return torch.cat([value, -value], -1)


def _pairs(name: str, described: dict[str, Any], model: Teacher) -> PromptPairs:
    """Random sequences whose answers, by the model itself, differ; of a number the clean one's is the higher."""
    letters = [token for token in described["tokens"] if token not in ("BOS", "compiler_pad")]
    draw, length, first = seeds.chooser(0, "programs", name), described["length"], len(described["tokens"])
    tokens = torch.tensor(
        [tokens_of(described, draw.choices(letters, k=length - 1)) for _ in range(8 * PROMPTS)], dtype=torch.long
    )
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        said = model.final_logits(tokens, mask)[:, first:]
    if isinstance(described["output"], list):
        answers = (said[:, 0] * 1e3).round()
        rows = [(a, b) for a, b in _two(len(tokens)) if answers[a] > answers[b]]
    else:
        sure = said.topk(2).values
        clear = (sure[:, 0] > 0.99) & (sure[:, 1] < 0.01)
        answers = said.argmax(-1)
        rows = [(a, b) for a, b in _two(len(tokens)) if clear[a] and clear[b] and answers[a] != answers[b]]
    clean, corrupt = (torch.tensor([row[side] for row in rows[:PROMPTS]]) for side in (0, 1))
    value = isinstance(described["output"], list)
    last = torch.zeros(len(clean), length, dtype=torch.bool)
    last[:, -1] = True
    return PromptPairs(
        clean=tokens[clean],
        corrupt=tokens[corrupt],
        mask=mask[: len(clean)],
        answers=first + (torch.zeros_like(clean) if value else answers[clean].long()),
        distractors=first + (torch.ones_like(clean) if value else answers[corrupt].long()),
        positions={"last": last, "all": mask[: len(clean)]},
    )


def _two(count: int) -> list[tuple[int, int]]:
    return [(row, row + 1) for row in range(0, count - 1, 2)] + [(row + 1, row) for row in range(0, count - 1, 2)]


def _writes(weights: dict[str, Tensor], described: dict[str, Any]) -> list[Tensor]:
    """The directions that each sender writes into."""
    heads, key = described["heads"], described["key_size"]
    found = [(weights["token_embed/embeddings"] != 0).any(0) | (weights["pos_embed/embeddings"] != 0).any(0)]
    for layer in range(described["layers"]):
        out = weights[f"transformer/layer_{layer}/attn/linear/w"]
        found += [(out[head * key : (head + 1) * key] != 0).any(0) for head in range(heads)]
        found.append((weights[f"transformer/layer_{layer}/mlp/linear_2/w"] != 0).any(0))
    return found


def _changes(model: Teacher, pairs: PromptPairs) -> list[Tensor]:
    """The directions into which each sender writes otherwise on some clean prompt than on its corrupt one."""
    sent = Sent.of(model, pairs)
    size = sent.clean.shape[-1]
    outputs = sent.outputs(slice(0, len(pairs)), range(sent.count)).unflatten(2, (pairs.clean.shape[1], size))
    return [(outputs[:, sender].abs() > 1e-2).flatten(0, 1).any(0) for sender in range(sent.count)]


def _reads(weights: dict[str, Tensor], described: dict[str, Any]) -> list[Tensor]:
    """The directions that each receiver reads."""
    heads, key, found = described["heads"], described["key_size"], list[Tensor]()
    for layer in range(described["layers"]):
        part = f"transformer/layer_{layer}"
        live = (weights[f"{part}/attn/linear/w"] != 0).any(1)
        for kind in ("query", "key", "value"):
            weight = weights[f"{part}/attn/{kind}/w"]
            own = [slice(head * key, (head + 1) * key) for head in range(heads)]
            found += [(weight[:, columns] != 0).any(1) & live[columns].any() for columns in own]
        found.append((weights[f"{part}/mlp/linear_1/w"] != 0).any(1))
    logits = torch.zeros(len(described["labels"]), dtype=torch.bool)
    logits[[direction for direction in _outputs(described).values() if direction >= 0]] = True
    return [*found, logits]


def _joined(model: Teacher, writes: list[Tensor], reads: list[Tensor]) -> Tensor:
    """Where a sender writes what a receiver reads, pruned to what lies on a way to the logits."""
    size = len(reads[0])
    edges = Edges.of(model)
    there = ~edges.connected(parallel=False).isnan()
    meets = torch.tensor([[bool((write[:size] & read).any()) for read in reads] for write in writes])
    return edges.pruned(there & meets)


def exact(model: Teacher, pairs: PromptPairs) -> Scores:
    """Every edge left out of the whole graph on its own."""
    patcher = EdgePatcher(model, pairs, execution=QUIET)
    clean = logit_difference(patcher.logits(patcher.there), pairs.answers, pairs.distractors)
    values = torch.full((*patcher.there.shape, len(pairs)), torch.nan)
    for row, column in patcher.there.nonzero().tolist():
        present = patcher.there.clone()
        present[row, column] = False
        values[row, column] = clean - logit_difference(patcher.logits(present), pairs.answers, pairs.distractors)
    return Scores(
        values=values, axes=("sender", "receiver", "example"), labels=patcher.edges.labels, unit="fall, edge left out"
    )


def _gradients(steps: int, end: str) -> Callable[[Teacher, PromptPairs], Scores]:
    return lambda model, pairs: attribute_edges(
        model,
        pairs,
        metric="logit_difference",
        steps=steps,
        end=end,  # type: ignore[arg-type]
        execution=QUIET,
    )


METHODS: dict[str, Callable[[Teacher, PromptPairs], Scores]] = {
    "EAP": _gradients(1, "clean"),
    "EAP-IG clean end": _gradients(16, "clean"),
    "EAP-IG corrupt end": _gradients(16, "corrupt"),
    "EAP-IG both ends": _gradients(16, "both"),
    "exact": exact,
}


def run() -> dict[str, Any]:
    """AUROC of every method's edges (and heads and MLPs), program by program."""
    table = {}
    for program in map(load, NAMES):
        rows = {}
        for method, score in METHODS.items():
            scores = _by_size(score(program.model, program.pairs))
            nodes, live = node_scores(scores), program.changing.any(1)[1:]
            rows[method] = {
                "edges": round(auroc(scores, program.changing), 3),
                "edges_wired": round(auroc(scores, program.wired), 3),
                "nodes": None if bool(live.all()) else round(auroc(nodes, live), 3),
            }
        sizes = {"edges": int(program.changing.sum()), "wired": int(program.wired.sum())}
        total = int((~Edges.of(program.model).connected(parallel=False).isnan()).sum())
        table[program.name] = {**sizes, "of": total, "auroc": rows}
    return {"name": "programs", "programs": table}


def _by_size(scores: Scores) -> Scores:
    """Mean size over prompts: on a program one prompt's edge may help where another's hurts."""
    return Scores(values=scores.values.abs(), axes=scores.axes, labels=scores.labels, unit=f"|{scores.unit}|")
