"""The door of a model's folder: a saved miniature with one thing broken is loaded right or refused, never anything
else.

Broken: a JSON value of the wrong type, null, huge or a string; a key removed; a file truncated, emptied, removed,
replaced by a directory, by an LFS pointer or by other bytes; keys of the weights renamed, removed, added or cut short.
"""

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from miniatures import SUPPORTED, miniature
from safetensors.torch import load_file, save_file

from workbench.errors import InputError
from workbench.models.hooked_model import Teacher

FAMILIES = ("Llama", "GPT2", "GPTNeoX", "Qwen3", "Phi3")
VALUES: tuple[Any, ...] = (None, "a string", "", 10**12, -1, 0, 1.5, 1e300, True, [], [1, "a"], {}, {"a": {"b": 1}})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
Mutation = Callable[[random.Random, Path], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family's miniature, and the seed of what is broken in it."""

    family: str
    mutation: str
    seed: str

    @property
    def name(self) -> str:
        """For the screen."""
        return f"{self.family}/{self.mutation}/{self.seed}"


def cases(seed: int, count: int) -> Iterator[Case]:
    """So many cases, a function of the seed."""
    draw = random.Random(f"models {seed}")
    kinds, families = sorted(MUTATIONS), list(FAMILIES)
    for number in range(count):
        yield Case(family=draw.choice(families), mutation=kinds[number % len(kinds)], seed=f"{seed}-{number}")


def outcome(case: Case) -> tuple[str, str]:
    """What came of a case (one of OUTCOMES), and what was said."""
    whole, fingerprint = original(case.family)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(whole, folder)
        broken = MUTATIONS[case.mutation](random.Random(f"{case.family} {case.mutation} {case.seed}"), folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is only warned of must come out as a fingerprint
                loaded = Teacher.load(folder).fingerprint()
        except InputError as error:
            said = str(error)
            return ("refused" if str(folder) in said else "raw"), f"{broken}: {said[:300]}"
        except Exception as error:
            return "raw", f"{broken}: {type(error).__name__}: {str(error)[:300]}"
    return ("right" if loaded == fingerprint else "silent"), broken


@cache
def original(family: str) -> tuple[Path, str]:
    """The whole miniature and its fingerprint."""
    folder = miniature(family, SUPPORTED[family], Path(tempfile.mkdtemp(prefix=f"fuzz-{family}-")))
    return folder, Teacher.load(folder).fingerprint()


JSON_FILES = ("config.json", "config.json", "config.json", "tokenizer_config.json", "tokenizer.json")
"""The config most often."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value (of lists and large mappings, the first few entries)."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:60]:
        yield from _places(inner, (*path, key))


def _at_a_place(draw: random.Random, folder: Path, change: Callable[[Any, Any], str]) -> str:
    file = folder / draw.choice([name for name in JSON_FILES if (folder / name).exists()])
    value = json.loads(file.read_text())
    path = draw.choice([path for path in _places(value) if path])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = change(parent, path[-1])
    file.write_text(json.dumps(value))
    return f"{file.name} {'.'.join(map(str, path))} {what}"


def json_value(draw: random.Random, folder: Path) -> str:
    """Another value somewhere."""
    new = draw.choice(VALUES)

    def change(parent: Any, key: Any) -> str:
        parent[key] = new
        return f"= {new!r}"

    return _at_a_place(draw, folder, change)


def json_removed(draw: random.Random, folder: Path) -> str:
    """A key or an entry less."""

    def change(parent: Any, key: Any) -> str:
        del parent[key]
        return "removed"

    return _at_a_place(draw, folder, change)


def json_whole(draw: random.Random, folder: Path) -> str:
    """Something else than a mapping, or no JSON."""
    file = folder / draw.choice([name for name in JSON_FILES if (folder / name).exists()])
    text = draw.choice(["[]", "null", '"text"', "3", "{", "{}", "\ufeff{}", "NaN", "<html>", '{"a": 1}'])
    file.write_text(text, encoding="utf-8")
    return f"{file.name} is {text!r}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def file_cut(draw: random.Random, folder: Path) -> str:
    """A file truncated, emptied, removed, or other bytes."""
    file = draw.choice([folder / "model.safetensors", *_files(folder)])
    content, how = file.read_bytes(), draw.choice(("cut", "empty", "removed", "pointer", "noise", "longer"))
    if how == "removed":
        file.unlink()
    else:
        cut = content[: draw.randrange(len(content))]
        new = {"cut": cut, "empty": b"", "pointer": POINTER, "noise": draw.randbytes(200), "longer": content + b"xx"}
        file.write_bytes(new[how])
    return f"{file.name} {how}"


def file_replaced(draw: random.Random, folder: Path) -> str:
    """A directory in a file's place, or a link to nothing."""
    file, link = draw.choice(_files(folder)), draw.random() < 0.3
    file.unlink()
    if link:
        file.symlink_to(folder / "gone")
    else:
        file.mkdir()
    return f"{file.name} is {'a link to nothing' if link else 'a directory'}"


def weights(draw: random.Random, folder: Path) -> str:
    """Keys renamed, removed, added, or a tensor of another shape."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key, how = draw.choice(sorted(tensors)), draw.choice(("prefix", "rename", "removed", "added", "cut", "swapped"))
    if how == "prefix":
        prefix = draw.choice(("module.", "model.", "_orig_mod.", "base_model.model."))
        tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
    elif how == "rename":
        tensors[f"{key}{draw.choice(('_', '.old', '0'))}"] = tensors.pop(key)
    elif how == "removed":
        del tensors[key]
    elif how == "added":
        tensors[draw.choice(("more.weight", "model.layers.7.self_attn.q_proj.weight", "transformer.h.9.ln_1.bias"))] = (
            tensors[key].clone()
        )
    elif how == "cut":
        tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()
    else:
        tensors[key] = tensors[key].flatten().clone()[None]
    save_file(tensors, file, metadata={"format": "pt"})
    return f"weights {how} {key}"


def index(draw: random.Random, folder: Path) -> str:
    """The weights through an index that is wrong."""
    keys = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names: dict[str, Any] = dict.fromkeys(keys, "part.safetensors")
    key = draw.choice(keys)
    how = draw.choice(("whole", "missing", "bin", "outside", "number", "no map", "list", "gone"))
    if how == "missing":
        del names[key]
    elif how in ("bin", "outside", "number", "gone"):
        names[key] = {"bin": "x.bin", "outside": "../../x.safetensors", "number": 3, "gone": "x.safetensors"}[how]
    value = {"no map": {}, "list": {"weight_map": keys}}.get(how, {"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    return f"index {how} {key}"


def generation(draw: random.Random, folder: Path) -> str:
    """A generation config that is not one."""
    text = draw.choice(["{}", "[]", "{", '{"eos_token_id": "x"}', '{"max_length": "long"}', '{"temperature": -1}'])
    (folder / "generation_config.json").write_text(text)
    return f"generation_config.json is {text}"


def config_key(draw: random.Random, folder: Path) -> str:
    """A key that changes how a model is loaded."""
    key, value = draw.choice(
        (
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("quantization_config", "x"),
            ("_attn_implementation", "flash_attention_2"),
            ("_attn_implementation", "somebody/kernels"),
            ("attn_implementation", "somebody/kernels"),
            ("transformers_weights", "other.safetensors"),
            ("transformers_weights", 3),
            ("fusion_config", {"a": 1}),
            ("tie_word_embeddings", True),
            ("pad_token_id", 10**6),
            ("auto_map", {"AutoModelForCausalLM": "code.Mine"}),
            ("model_type", "nothing-known"),
            ("model_type", "bert"),
            ("model_type", "t5"),
            ("architectures", ["Nothing"]),
            ("dtype", "float7"),
            ("torch_dtype", "bfloat16"),
        )
    )
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    return f"config.json {key} = {value!r}"


MUTATIONS: dict[str, Mutation] = {
    "json value": json_value,
    "json removed": json_removed,
    "json whole": json_whole,
    "file cut": file_cut,
    "file replaced": file_replaced,
    "weights": weights,
    "index": index,
    "generation": generation,
    "config key": config_key,
}
