"""A model's folder loads exactly its own weights, or is refused with the file and the remedy; a saved copy is the same
model in every respect."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFolder
from fuzz import figures
from miniatures import SUPPORTED, miniature
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from workbench.errors import InputError
from workbench.models import sources
from workbench.models.hooked_model import Student, Teacher
from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer

CLOSE = 2e-5
FAMILIES = {**SUPPORTED, "Mixtral": {"num_local_experts": 4}}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def rewrite(folder: Path, change: Change, name: str = "model.safetensors") -> None:
    save_file(
        {key: value.contiguous() for key, value in change(load_file(folder / name)).items()},
        folder / name,
        metadata={"format": "pt"},
    )


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def prompts(length: int = 9) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, len(word_tokenizer()), (2, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def final(model: Teacher | Student) -> Tensor:
    return model.final_logits(*prompts()).detach()


# --- weights: all of them, or none ---


@pytest.mark.parametrize("family", FAMILIES)
def test_two_loads_have_one_fingerprint_and_a_saved_copy_the_same(family: str, tmp_path: Path) -> None:
    folder = miniature(family, FAMILIES[family], tmp_path / "model")
    student = Student.load(folder)
    fingerprint = student.fingerprint()
    assert Student.load(folder).fingerprint() == fingerprint
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters().values()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    student.save(tmp_path / "saved")
    again = Student.load(tmp_path / "saved")
    assert again.fingerprint() == student.fingerprint() != fingerprint
    assert float((final(again) - final(student)).abs().max()) < CLOSE


def middle(tensors: dict[str, Tensor]) -> str:
    return sorted(tensors)[len(tensors) // 2]


WRONG: dict[str, Change] = {
    "all prefixed": lambda tensors: {f"module.{key}": value for key, value in tensors.items()},
    "one missing": lambda tensors: {key: value for key, value in tensors.items() if key != middle(tensors)},
    "one renamed": lambda tensors: {
        f"{key}_" if key == middle(tensors) else key: value for key, value in tensors.items()
    },
    "one left over": lambda tensors: {**tensors, "adapter.weight": torch.ones(3)},
    "one cut": lambda tensors: {**tensors, middle(tensors): tensors[middle(tensors)][:1]},
    "none but a decoy": lambda _: {"decoy": torch.ones(1)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = miniature(family, FAMILIES[family], tmp_path / "model")
    for name, change in WRONG.items():
        rewrite(copied(folder, tmp_path / name), change)
        with pytest.raises(
            InputError, match=r"do not fit its config|could not be loaded|but the weights have"
        ) as refused:
            Student.load(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


def test_a_bundled_students_missing_matrix_is_named(tmp_path: Path) -> None:
    folder = copied(Path("assets/models/student"), tmp_path / "student")
    gone = "model.layers.1.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if key != gone})
    with pytest.raises(InputError, match=f"missing: {gone}.*drawn at random"):
        Student.load(folder)


def test_what_older_versions_left_in_a_file_is_harmless(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Rotary frequencies of Llama and NeoX, causal masks of GPT-2 and NeoX."""
    for architecture, extra in {
        "llama": {"model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"},
        "gpt2": {"transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"},
        "neox": {"gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"},
    }.items():
        folder = copied(model_folder(architecture), tmp_path / architecture)
        rewrite(folder, lambda tensors, extra=extra: {**tensors, **{name: torch.ones(4) for name in extra}})
        assert Student.load(folder).fingerprint() == Student.load(model_folder(architecture)).fingerprint()


def test_a_tied_unembedding_may_be_left_out_or_equal_but_not_another(tmp_path: Path) -> None:
    folder = miniature("Llama", {}, tmp_path / "tied", tie_word_embeddings=True)
    fingerprint = Student.load(folder).fingerprint()
    embedding = "model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()})
    assert Student.load(folder).fingerprint() == fingerprint
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding] + 1})
    with pytest.raises(
        InputError, match=r"lm_head.weight is not the embedding, and config.json says tie_word_embeddings"
    ):
        Student.load(folder)
    untied = miniature("Llama", {}, tmp_path / "untied")
    change_json(untied / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match="do not fit its config"):
        Student.load(untied)


def test_quantised_weights_are_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        InputError, match=r"quantised weights \(quantization_config: gptq\).*give the model that they were"
    ):
        Student.load(folder)
    whole = copied(model_folder("llama"), tmp_path / "whole")
    rewrite(whole, lambda tensors: {**tensors, middle(tensors): tensors[middle(tensors)].to(torch.int8)})
    with pytest.raises(InputError, match=r"holds whole numbers for .*quantised weights"):
        Student.load(whole)


# --- adapters ---


def lora(base: Path, target: Path, modules: list[str], **settings: Any) -> Tensor:
    """A LoRA adapter whose B is not zero, and peft's own logits with it."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, or does not
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(plain, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(target)
        with torch.no_grad():
            return model.eval()(prompts()[0]).logits[:, -1]


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"], ["q_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_computes_what_peft_computes_also_on_tied_embeddings(
    modules: list[str], tied: bool, tmp_path: Path
) -> None:
    base = miniature("Llama", {}, tmp_path / "base", tie_word_embeddings=tied)
    expected = lora(base, tmp_path / "adapter", modules)
    student = Student.load(tmp_path / "adapter")
    assert float((final(student) - expected).abs().max()) < 10 * CLOSE
    assert float((final(Student.load(base)) - expected).abs().max()) > 1e3 * CLOSE
    student.save(tmp_path / "merged")
    again = Student.load(tmp_path / "merged")
    assert torch.equal(final(again), final(student))
    assert again.fingerprint() == student.fingerprint() == Student.load(tmp_path / "adapter").fingerprint()


ADAPTERS: dict[str, Change] = {
    "renamed": lambda tensors: {key.replace("base_model", "base"): value for key, value in tensors.items()},
    "other layers": lambda tensors: {key.replace("layers.0", "layers.9"): value for key, value in tensors.items()},
    "one missing": lambda tensors: {key: value for key, value in tensors.items() if key != sorted(tensors)[0]},
    "one too many": lambda tensors: {**tensors, "base_model.model.x.lora_A.weight": torch.ones(2, 2)},
    "empty": lambda _: {"decoy": torch.ones(1)},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_whose_keys_do_not_fit_is_refused(name: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    lora(model_folder("llama"), tmp_path / "adapter", ["q_proj", "v_proj"])
    Student.load(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", ADAPTERS[name], "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"weights of the adapter .* do not fit its base: (missing|not applied): "):
        Student.load(tmp_path / "adapter")


def test_an_adapter_on_an_adapter_and_one_that_imports_are_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    lora(model_folder("llama"), tmp_path / "adapter", ["q_proj"])
    second = copied(tmp_path / "adapter", tmp_path / "second")
    change_json(second / "adapter_config.json", base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"is itself an adapter .*merge that one first"):
        Student.load(second)
    change_json(tmp_path / "adapter" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(InputError, match="names a module to import"):
        Student.load(tmp_path / "adapter")


# --- nothing that can run code, nothing from elsewhere ---


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "boom")


def sharded(folder: Path, names: Callable[[str], str]) -> None:
    """Replace the weights by an index that names files."""
    keys = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {key: names(key) for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_no_way_leads_to_a_pickle(model_folder: ModelFolder, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))

    def armed(name: str) -> Path:
        folder = copied(model_folder("llama"), tmp_path / name)
        (folder / "pytorch_model.bin").write_bytes(bomb)
        return folder

    refused = pytest.raises(InputError, match="Pickled weights are never loaded")
    one = armed("index")
    sharded(one, lambda _: "pytorch_model.bin")
    with refused:
        Student.load(one)
    some = armed("half of the index")
    sharded(some, lambda key: "pytorch_model.bin" if "lm_head" in key else "part.safetensors")
    with refused:
        Student.load(some)
    stray = armed("stray")  # weights by another name do not count
    (stray / "model.safetensors").rename(stray / "decoy.safetensors")
    with refused:
        Student.load(stray)
    disguised = armed("disguised")
    (disguised / "model.safetensors").write_bytes(bomb)
    with pytest.raises(InputError, match="no whole safetensors file"):
        Student.load(disguised)
    lora(model_folder("llama"), tmp_path / "adapter", ["q_proj"])
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "decoy.safetensors")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(bomb)
    with refused:
        Student.load(tmp_path / "adapter")
    named = armed("named in the config")
    change_json(named / "config.json", transformers_weights="pytorch_model.bin")
    assert Student.load(named).fingerprint() == Student.load(model_folder("llama")).fingerprint()
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "link.safetensors", "/ABSOLUTE/model.safetensors"])
def test_weights_outside_the_folder_are_refused(name: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    other = copied(model_folder("llama"), tmp_path / "other")
    folder = copied(model_folder("llama"), tmp_path / "model")
    (folder / "link.safetensors").symlink_to(other / "model.safetensors")
    sharded(folder, lambda _: name.replace("/ABSOLUTE", str(other)))
    with pytest.raises(InputError, match="lies outside"):
        Student.load(folder)
    single = copied(model_folder("llama"), tmp_path / "single")
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(InputError, match="lies outside"):
        Student.load(single)


def test_links_of_a_hub_cache_and_a_linked_folder_are_fine(model_folder: ModelFolder, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--tiny"
    snapshot = copied(model_folder("llama"), repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repository / "blobs" / f"sha-{file.name}")
        file.symlink_to(Path("../../blobs") / f"sha-{file.name}")
    (tmp_path / "link").symlink_to(model_folder("llama"))
    expected = Student.load(model_folder("llama")).fingerprint()
    assert Student.load(snapshot).fingerprint() == expected
    assert Student.load(tmp_path / "link").fingerprint() == expected


def test_two_sets_of_weights_and_parts_of_a_distributed_training_are_refused(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = copied(model_folder("llama"), tmp_path / "two")
    weights = (folder / "model.safetensors").read_bytes()
    sharded(folder, lambda _: "part.safetensors")
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="two sets of weights; delete the one that is not meant"):
        Student.load(folder)
    parts = copied(model_folder("llama"), tmp_path / "parts")
    shutil.copy(parts / "model.safetensors", parts / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="a part of one process"):
        Student.load(parts)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_a_config_never_chooses_a_kernel(
    key: str, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    for loader in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        if hasattr(hub_kernels, loader):
            monkeypatch.setattr(hub_kernels, loader, lambda *_, **__: pytest.fail("a kernel was asked for"))
    folder = copied(model_folder("llama"), tmp_path / "model")
    change_json(folder / "config.json", **{key: "somebody/kernels"})
    student = Student.load(folder)
    assert torch.equal(final(student), final(Student.load(model_folder("llama"))))
    student.save(tmp_path / "saved")
    assert "kernels" not in (tmp_path / "saved" / "config.json").read_text()


# --- what survives a save ---


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_saved_copy_generates_the_same(family: str, tmp_path: Path) -> None:
    """Generation settings, special tokens, added tokens and the chat template of the original, some of which
    `transformers` reads but would not write."""
    folder = miniature(family, SUPPORTED[family], tmp_path / "model", bos_token_id=2, eos_token_id=7)
    settings = {"max_new_tokens": 12, "eos_token_id": [7, 11], "pad_token_id": 0, "repetition_penalty": 1.7}
    GenerationConfig(**settings, no_repeat_ngram_size=2).save_pretrained(folder)
    change_json(folder / "generation_config.json", temperature=0.3, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "apple", "additional_special_tokens": ["box"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    student = Student.load(folder)
    student.save(tmp_path / "saved")
    again, tokens = Student.load(tmp_path / "saved"), prompts()[0]
    told = [
        AutoModelForCausalLM.from_pretrained(place).generate(tokens, attention_mask=torch.ones_like(tokens))
        for place in (folder, tmp_path / "saved")
    ]
    assert torch.equal(*told)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.generation_config = GenerationConfig(max_new_tokens=12, pad_token_id=0)
    assert not torch.equal(plain.generate(tokens, attention_mask=torch.ones_like(tokens)), told[0]), "they matter"
    ours, theirs = again.tokenizer, AutoTokenizer.from_pretrained(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    chat = [{"role": "user", "content": "apple box"}]
    assert (
        ours.apply_chat_template(chat, tokenize=False)
        == theirs.apply_chat_template(chat, tokenize=False)
        == "apple box "
    )
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "saved")]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert configs[0][key] == configs[1][key]


# --- prompts at the door ---


def test_padding_beyond_the_embedding_is_refused_on_loading(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"pads with '<padding>' \(token 98\), beyond the model's 98 embeddings"):
        Student.load(folder)
    other = copied(model_folder("gpt2"), tmp_path / "other")
    change_json(other / "config.json", pad_token_id=98)
    with pytest.raises(InputError, match="says pad_token_id 98, beyond the embedding's 98 rows"):
        Student.load(other)


def test_prompts_that_do_not_fit_are_refused_by_name(architecture: str, model_folder: ModelFolder) -> None:
    teacher = Teacher.load(model_folder(architecture))
    rows, limit = len(word_tokenizer()), 256
    assert teacher.context == limit
    long, mask = prompts(limit + 1)
    with pytest.raises(InputError, match=r"a prompt has 257 tokens, and .* reads 256; shorten the prompts"):
        teacher.final_logits(long, mask)
    mask[:, 0] = False  # padding does not count: its positions are not used
    assert teacher.final_logits(long, mask).isfinite().all()
    tokens, mask = prompts()
    tokens[1, 3] = rows
    for run in (lambda: teacher.final_logits(tokens, mask), lambda: teacher.early_activations(tokens, mask, [])):
        with pytest.raises(InputError, match=rf"prompt 1 has the token {rows}, and .* has {rows} embeddings"):
            run()
    mask[1, :4] = False
    with pytest.raises(InputError, match=rf"the token {rows} \(padding\)"):
        teacher.final_logits(tokens, mask)


def test_a_context_shorter_than_the_self_checks_prompts(tmp_path: Path) -> None:
    folder = miniature("GPT2", {**SUPPORTED["GPT2"], "n_positions": 5}, tmp_path)
    assert Teacher.load(folder).context == 5


def test_a_device_or_dtype_that_there_is_not_is_refused(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    with pytest.raises(InputError, match=r"'float23', and it must be one of float32, .*did you mean .*'float32'"):
        Teacher.load(folder, dtype="float23")
    with pytest.raises(InputError, match="'gpu' is no device"):
        Teacher.load(folder, device="gpu")
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InputError, match=rf"no device '{missing}': this machine has"):
        Teacher.load(folder, device=missing)


# --- refusals come first, and none is a traceback ---


def test_an_unfit_architecture_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, tmp_path)
    monkeypatch.setattr(sources, "plain_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=r"its blocks have no attention with heads; choose a model"):
        Teacher.load(folder)


def test_an_unfit_gguf_file_is_refused_before_its_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "mamba")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 64),
        (writer.add_ssm_conv_kernel, 4),
        (writer.add_ssm_inner_size, 64),
        (writer.add_ssm_state_size, 16),
        (writer.add_ssm_time_step_rank, 2),
        (writer.add_layer_norm_rms_eps, 1e-6),
    ):
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setattr(sources, "AutoTokenizer", None)  # the conversion would begin with it
    with pytest.raises(InputError, match="its blocks have no attention with heads"):
        Teacher.load(tmp_path / "model.gguf")
    assert not list((tmp_path / "cache" / "gguf").iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"GGU", b"GGUF", b"GGUF" + bytes(40), b"GGUF" + b"\xff" * 40, b"version https://git-lfs"]
)
def test_a_malformed_gguf_file_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"model.gguf (is no GGUF file|could not be read).*download or copy it again"):
        Teacher.load(tmp_path / "model.gguf")


def test_a_model_folder_broken_in_one_place_loads_right_or_is_refused() -> None:
    found = figures("models", seed=1, count=27)
    assert not found.harmful, found.text()
    assert min(found.counts["right"], found.counts["refused"]) >= 4, found.text()
