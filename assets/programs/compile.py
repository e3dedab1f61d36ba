"""Compile five RASP programs with tracr and write their weights: NAME.safetensors and NAME.json.

In an environment of its own (`pip install tracr-pypi safetensors`; it needs jax and haiku): `python compile.py`.
Causal, as our models are; a program's answer is read at the last position, where a causal `reverse` is the usual one.
The JSON holds what the weights are of, and what tracr's own model computes on some sequences.
"""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

HERE = Path(__file__).parent
EXAMPLES = 24


def programs():
    """Name -> (program, vocabulary, length)."""
    prev = rasp.Aggregate(rasp.Select(rasp.indices, rasp.indices, lambda k, q: k == q - 1), rasp.tokens).named("prev")
    induction = rasp.Aggregate(rasp.Select(prev, rasp.tokens, lambda k, q: k == q), rasp.tokens).named("induction")
    return {
        "xproportion": (lib.make_frac_prevs(rasp.tokens == "x"), "wxyz", 5),
        "reverse": (lib.make_reverse(rasp.tokens), "abc", 5),
        "induction": (induction, "abcd", 6),
        "histogram": (lib.make_hist(), "abc", 5),
        "pattern": (lib.detect_pattern(rasp.tokens, ["a", "b"]), "abc", 5),
    }


def main():
    """Write all."""
    for name, (program, letters, length) in programs().items():
        model = compiling.compile_rasp_to_model(
            program, vocab=set(letters), max_seq_len=length, compiler_bos="BOS", causal=True
        )
        tensors = {
            f"{module}/{key}": np.ascontiguousarray(value, dtype=np.float32)
            for module, values in model.params.items()
            for key, value in values.items()
        }
        save_file(tensors, HERE / f"{name}.safetensors")
        config, draw = model.model_config, random.Random(0)
        outputs = getattr(model.output_encoder, "encoding_map", None)
        label = program.label
        dims = [i for i, text in enumerate(model.residual_labels) if text.split(":")[0] == label]
        examples = []
        for _ in range(EXAMPLES):
            sequence = draw.choices(letters, k=length)
            examples.append({"tokens": sequence, "last": model.apply(["BOS", *sequence]).decoded[-1]})
        described = {
            "layers": config.num_layers,
            "heads": config.num_heads,
            "key_size": config.key_size,
            "mlp_size": config.mlp_hidden_size,
            "length": length + 1,
            "labels": list(model.residual_labels),
            "tokens": {str(token): index for token, index in model.input_encoder.encoding_map.items()},
            "output": dims if outputs is None else {str(value): dims[place] for value, place in outputs.items()},
            "examples": [{**one, "last": one["last"] if outputs is None else str(one["last"])} for one in examples],
        }
        (HERE / f"{name}.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
