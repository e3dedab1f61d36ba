"""A teacher behind an endpoint, against a local server of the same protocol: where all log-probabilities come, the
training is that from the teacher's own logits; what a server gets wrong is refused with its remedy."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_background

from tests.distillation.distilling import PLAIN, PROMPTS, furthest, trained, values
from workbench.distillation.endpoint import Endpoint, endpoint_outputs
from workbench.distillation.losses import kl_to_teacher
from workbench.distillation.teacher_cache import TeacherCache, computed
from workbench.errors import InputError
from workbench.pretraining import word_tokenizer

Loader = Callable[..., Any]
INDEX = torch.arange(len(PROMPTS))


class Stub(HTTPServer):
    """Answers completions from the teacher's logits, as vLLM does; counts its requests."""

    def __init__(self, cache: TeacherCache, model: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        """Answers prompts that the cache does not hold."""
        ids = [tuple(tokens[mask].tolist()) for tokens, mask in zip(PROMPTS.clean, PROMPTS.mask, strict=True)]
        self.said = dict(zip(ids, cache.logits.double().log_softmax(-1).tolist(), strict=True))
        self.requests, self.texts, self.status, self.spoilt = 0, False, 200, {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def choice(self, prompt: list[int], k: int, number: int) -> dict[str, Any]:
        if self.model is not None and tuple(prompt) not in self.said:
            tokens = torch.tensor([prompt])
            with torch.no_grad():
                logits = self.model.final_logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
            self.said[tuple(prompt)] = logits[0].double().log_softmax(-1).tolist()
        row = self.said[tuple(prompt)]
        best = sorted(range(len(row)), key=lambda token: -row[token])[:k]
        names = word_tokenizer().convert_ids_to_tokens(best) if self.texts else [f"token_id:{token}" for token in best]
        top = dict(zip(names, (row[token] for token in best), strict=True))
        return {"index": number, "logprobs": {"top_logprobs": [top]}, **self.spoilt}


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["max_tokens"], asked["temperature"]) == ("/v1/completions", 1, 0)
        self.server.requests += 1
        known = self.server.status == 200 and self.headers["Authorization"] == "Bearer secret"
        choices = [self.server.choice(prompt, asked["logprobs"], n) for n, prompt in enumerate(asked["prompt"])]
        self.send_response(200 if known else 401)
        self.end_headers()
        answer = {"choices": choices[::-1]} if known else {"error": "who are you"}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def cache(model_folder: Loader) -> TeacherCache:
    from workbench.models.hooked_model import Teacher

    return computed(Teacher.load(model_folder("llama", seed=1), check=False), PROMPTS, [])


@pytest.fixture
def stub(cache: TeacherCache) -> Iterator[Stub]:
    server = Stub(cache)
    with in_background(server):
        yield server


def asked(stub: Stub, *, top: int, **named: Any) -> Any:
    endpoint = Endpoint(url=stub.url, model="tiny", key="secret", top=top)
    return endpoint_outputs(endpoint, PROMPTS, word_tokenizer(), d_vocab=named.pop("d_vocab"), **named)


@pytest.mark.parametrize("texts", [False, True], ids=["ids", "texts"])
def test_all_log_probabilities_are_the_teacher_itself(
    texts: bool, stub: Stub, cache: TeacherCache, load_student: Loader
) -> None:
    stub.texts = texts
    d_vocab = cache.logits.shape[1]
    student = load_student()
    logits = student.final_logits(PROMPTS.clean, PROMPTS.mask).detach()
    every, three = (asked(stub, top=top, d_vocab=d_vocab) for top in (d_vocab, 3))
    assert torch.equal(every.labels_of(INDEX), cache.labels)
    assert torch.equal(three.labels_of(INDEX), cache.labels)
    full = float(kl_to_teacher(logits, cache.logits))
    assert float(kl_to_teacher(logits, every.logits_of(INDEX))) == pytest.approx(full, abs=1e-5)
    assert full - float(kl_to_teacher(logits, three.logits_of(INDEX))) > 100 * 1e-5, "a lower bound"
    assert three.fingerprint != every.fingerprint


def test_a_training_from_an_endpoint_is_that_from_the_cache(
    stub: Stub, cache: TeacherCache, load_student: Loader, tmp_path: Path
) -> None:
    config, ends = replace(PLAIN, steps=2, task_loss="kl_teacher"), []
    every = asked(stub, top=cache.logits.shape[1], d_vocab=cache.logits.shape[1])
    for number, outputs in enumerate((cache, every)):
        student = load_student()
        trained(student, outputs, config, tmp_path / str(number))
        ends.append(values(student))
    assert furthest(*ends) < 1e-4
    assert furthest(ends[0], values(load_student())) > 100 * 1e-4
    with pytest.raises(InputError, match="no activations"):
        every.rows(INDEX, ["blocks.0.attn.hook_z"])


def test_what_was_asked_is_not_asked_again(stub: Stub, cache: TeacherCache, tmp_path: Path) -> None:
    named: dict[str, Any] = {"top": 3, "d_vocab": cache.logits.shape[1], "folder": tmp_path, "batch": 10}
    first = asked(stub, **named)
    assert stub.requests == -(-len(PROMPTS) // 10)
    next(tmp_path.glob("*.json")).unlink()
    again = asked(stub, **named)
    assert stub.requests == -(-len(PROMPTS) // 10) + 1, "one batch was lost"
    assert again.fingerprint == first.fingerprint


def test_what_a_server_gets_wrong_is_refused(stub: Stub, cache: TeacherCache) -> None:
    d_vocab = cache.logits.shape[1]
    for change, message in (
        ({"spoilt": {"logprobs": None}}, "gives no log-probabilities"),
        ({"spoilt": {"logprobs": {"top_logprobs": [{"no such word": -0.1}]}}}, "no token of this vocabulary"),
        ({"spoilt": {"logprobs": {"top_logprobs": [{f"token_id:{d_vocab}": -0.1}]}}}, "no token of this vocabulary"),
        ({"spoilt": {}, "status": 401}, r"401: .*who are you.*check the model's name, the key"),
    ):
        for name, value in change.items():
            setattr(stub, name, value)
        with pytest.raises(InputError, match=message):
            asked(stub, top=3, d_vocab=d_vocab)
    with pytest.raises(InputError, match="does not answer"):
        Endpoint(url="http://127.0.0.1:9", model="tiny").completions([[1]])
    with pytest.raises(InputError, match="no address"):
        Endpoint(url="localhost:8000", model="tiny")
    assert "secret" not in repr(Endpoint(url=stub.url, model="tiny", key="secret"))


def test_a_recipe_whose_teacher_answers_elsewhere(
    small_recipe: Loader, cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import yaml

    from workbench.cli import main
    from workbench.models.hooked_model import Student, Teacher

    value = small_recipe(conditions=["full_kl", "circuit_ce"], evaluation={"random_circuits": 1, "curve": False})
    value["training"] = {**value["training"], "heads": "circuit", "task_loss": "ce_teacher"}
    teacher = Teacher.load(value["teacher"], check=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(value))
    monkeypatch.setenv("MY_KEY", "secret")
    server = Stub(cache, teacher)

    def run(out: str, *settings: str) -> int:
        words = [word for setting in settings for word in ("--set", setting)]
        return main(["evaluate", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / out), *words])

    elsewhere = ("teacher=tiny", f"endpoint.url={server.url}", f"endpoint.top={teacher.d_vocab}")
    with in_background(server):
        assert run("served", *elsewhere, "endpoint.key_variable=MY_KEY") == 0
        assert run("loaded") == 0
        table = capsys.readouterr().out
        assert run("refused", *elsewhere, "conditions=[circuit_ce_cka]") == 2
        assert "align activations, and an endpoint gives none; name conditions without" in capsys.readouterr().err
        assert run("refused", *elsewhere, "training.heads=matched") == 2
        assert "set `training.heads: circuit` to train the student's own circuit" in capsys.readouterr().err
        assert run("refused", "teacher=tiny", "endpoint.url=http://me:secret@localhost/v1") == 2
        assert "environment variable" in capsys.readouterr().err
    # predicted = measured: all log-probabilities are the teacher itself, so the students are those of the loaded one
    for condition in ("full_kl-0", "circuit_ce-0"):
        served, loaded = (
            Student.load(tmp_path / out / "conditions" / condition / "student", check=False)
            for out in ("served", "loaded")
        )
        untrained = Student.load(value["student"], check=False)
        models = (served, loaded, untrained)
        logits, same, before = (each.final_logits(PROMPTS.clean, PROMPTS.mask).detach() for each in models)
        assert float((logits - same).abs().max()) < 1e-4
        assert float((logits - before).abs().max()) > 1e-2
    # the key is nowhere, and what needs a loaded teacher is not there
    written = b"".join(file.read_bytes() for file in (tmp_path / "served").rglob("*") if file.is_file())
    assert b"secret" not in written
    assert b"MY_KEY" in written
    assert not list((tmp_path / "served").rglob("*teacher*.json"))
    assert not (tmp_path / "served" / "head_map.json").exists()
    assert "full / KL" in table
