"""A digest is SHA-256 over the bytes of its parts, however they lie; a fingerprint is of the weights as they are."""

import hashlib
from collections.abc import Callable

import pytest
import torch

from workbench import storage
from workbench.models.hooked_model import Teacher
from workbench.storage.digests import checksum, digest

LAID_OUT = {
    "in order": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(12.0).view(3, 4).T,
    "with gaps": torch.arange(24.0)[::2],
    "half": torch.arange(6).to(torch.bfloat16),
    "one number": torch.tensor(2.5),
    "nothing": torch.zeros(0),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_digest_is_of_the_bytes(name: str) -> None:
    part = LAID_OUT[name]
    whole = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert digest("a", part, b"b") == hashlib.sha256(b"a|" + whole + b"|b").hexdigest()
    assert checksum("a", part) == checksum("a", part.clone())


def test_a_checksum_sees_one_number() -> None:
    part = torch.zeros(1000)
    before = checksum(part)
    part[371] = 1e-30
    assert checksum(part) != before


def test_a_fingerprint_is_taken_anew_only_of_other_weights(
    load_teacher: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = load_teacher(), []
    known = model.fingerprint()
    monkeypatch.setattr(storage, "digest", lambda *parts, **how: taken.append(parts) or digest(*parts, **how))
    assert model.fingerprint() == known
    assert not taken
    weight = next(iter(model.parameters().values()))
    before = weight.detach().clone()
    weight.data[0, 0] += 1e-3  # behind autograd's back
    changed = model.fingerprint()
    assert changed != known
    assert len(taken) == 1
    weight.data.copy_(before)
    assert model.fingerprint() == known
