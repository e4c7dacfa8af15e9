"""Which form of an op runs, and what a record says of it."""

from types import SimpleNamespace

import pytest
import torch

from kernels import backend, compiled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    chosen = backend.chosen()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._trouble.cache_clear()
    yield
    backend.use(chosen)
    backend._trouble.cache_clear()


def on_a_gpu(dtype=torch.float32, wants_gradient=False):
    """What `on_triton` looks at in a tensor of a GPU that is not here."""
    return SimpleNamespace(
        is_cuda=True,
        dtype=dtype,
        is_floating_point=lambda: dtype.is_floating_point,
        requires_grad=wants_gradient,
        device=torch.device("cuda"),
    )


def test_tensors_on_a_cpu_take_the_reference_unless_told_otherwise():
    assert not backend.on_triton(torch.ones(1))
    assert compiled.name_on(CPU) in ("reference", "compiled")  # where there is a C++ compiler


def test_an_unknown_name_is_refused_under_the_name_the_user_typed():
    with pytest.raises(ValueError, match=r"kernels\.backend=cuda: give one of auto, reference, triton"):
        backend.use("cuda")
    assert backend.chosen() == "auto"


def test_triton_on_a_cpu_is_an_error_that_says_what_works():
    backend.use("triton")
    for ask in (lambda: backend.on_triton(torch.ones(1)), lambda: compiled.name_on(CPU)):
        with pytest.raises(RuntimeError, match=r"kernels\.backend=triton: .*kernels\.backend=reference works"):
            ask()


def test_triton_on_a_cpu_works_in_the_interpreter_and_the_record_says_so(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend.use("triton")
    assert backend.on_triton(torch.ones(1), torch.ones(1, dtype=torch.int32))
    assert compiled.name_on(CPU) == "triton (interpreted)"
    backend.use("auto")
    assert not backend.on_triton(torch.ones(1))


@pytest.mark.parametrize(("trouble", "expected"), [(None, "triton"), ("no compiler", "reference")])
def test_on_a_gpu_the_choice_follows_what_works_there(trouble, expected, monkeypatch):
    monkeypatch.setattr(backend, "_trouble", lambda device, interpreted: trouble)
    # the fixture clears the cache of what is patched away here
    monkeypatch.setattr(backend._trouble, "cache_clear", lambda: None, raising=False)
    assert backend.on_triton(on_a_gpu()) is (expected == "triton")
    assert compiled.name_on(torch.device("cuda")) == expected
    backend.use("reference")
    assert not backend.on_triton(on_a_gpu())
    assert compiled.name_on(torch.device("cuda")) == "reference"


def test_what_only_the_reference_has_goes_there(monkeypatch):
    monkeypatch.setattr(backend, "_trouble", lambda device, interpreted: None)
    monkeypatch.setattr(backend._trouble, "cache_clear", lambda: None, raising=False)
    assert backend.on_triton(on_a_gpu(torch.bfloat16), on_a_gpu(torch.int32))
    assert not backend.on_triton(on_a_gpu(torch.float64))
    assert not backend.on_triton(on_a_gpu(), on_a_gpu(wants_gradient=True))
    with torch.no_grad():
        assert backend.on_triton(on_a_gpu(), on_a_gpu(wants_gradient=True))
