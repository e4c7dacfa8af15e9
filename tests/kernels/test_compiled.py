"""The C++ forms agree with the definition, are built once, and are done without where they cannot be built."""

import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from kernels import Rules, attend_with_mass, backend, compiled
from kernels.attend import Pages, attend_pages, attend_pages_with_mass
from kernels.attend import compiled as attend_compiled
from kernels.attend_quantized import attend_quantized
from kernels.attend_quantized import compiled as form
from kernels.mass import compiled as mass_compiled
from kernels.quantize import Packed, dequantize, quantize
from tests.bounds import bound, near
from tests.kernels.formula import allowed

needs_compiler = pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
QUICK = "-std=c++17 -O0 -fPIC"  # where what is built is not run


@pytest.fixture(autouse=True)
def as_before():
    chosen = backend.chosen()
    backend.use("auto")
    yield
    backend.use(chosen)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A user who has built nothing yet; what is found out here is forgotten afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path / "kvfrontier"
    compiled.library.cache_clear()


def packed(n: int, D: int, bits: int, group: int, dim: int, B: int = 2, H: int = 2, spare: int = 0) -> Packed:
    """Random codes of n tokens, in buffers with places for more, as a cache holds them."""
    x = torch.randn(B, H, n + spare, D, generator=torch.Generator().manual_seed(n + D)) * 3 + 1
    return quantize(x, bits, group, dim).narrow(0, n)


def product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """a @ b in float64, and how far float32 may be from it."""
    a, b = a.double(), b.double()
    return a @ b, bound(torch.float32, a.shape[-1], size=(a.abs() @ b.abs()).max().item())


@needs_compiler
@pytest.mark.parametrize("rows", [2, 3, 9])
@pytest.mark.parametrize(("D", "group"), [(64, 32), (64, 16), (128, 128), (80, 40), (32, 8), (256, 64)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_products_with_codes_are_products_with_what_they_stand_for(bits, D, group, rows):
    for dim, n in ((2, group), (2, 7 * group), (3, 1), (3, 63), (3, 1000)):
        codes = packed(n, D, bits, group, dim, spare=group)
        x = dequantize(codes, torch.float64)
        g = torch.Generator().manual_seed(rows)
        q, whole = torch.randn(2, 2, rows, D, generator=g), torch.full((2, 2, rows, n + 5), torch.nan)
        form.dot(q, codes, whole[..., :n])
        near(whole[..., :n], *product(q, x.mT))
        assert whole[..., n:].isnan().all()  # what belongs to other slots is not touched
        p = torch.rand(2, 2, rows, n + 5, generator=g)[..., :n]
        near(form.mix(p, codes), *product(p, x))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_heads_are_cut_into_pieces_where_there_are_more_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dim, n in ((2, 96), (3, 1), (3, 100)):
        codes, q, p = packed(n, 64, 4, 32, dim, B=1), torch.randn(1, 2, 3, 64), torch.rand(1, 2, 3, n)
        out = torch.full((1, 2, 3, n), torch.nan)
        form.dot(q, codes, out)
        near(out, *product(q, dequantize(codes).mT))
        near(form.mix(p, codes), *product(p, dequantize(codes)))


@needs_compiler
def test_scales_of_any_size_come_out_exactly():
    halves = torch.tensor([6e-8, 3e-5, -3e-5, 6.1e-5, 1.0, -65504.0, 65504.0, 0.0]).half().repeat(2)
    codes = Packed(torch.full((1, 1, 8, 16), 255, dtype=torch.uint8), halves.expand(1, 1, 1, -1).contiguous(),
                   halves.flip(0).expand(1, 1, 1, -1).contiguous(), 8, 8, 2)  # fmt: skip
    out = torch.empty(1, 1, 16, 8)
    form.dot(torch.eye(16)[None, None], codes, out)
    assert torch.equal(out.mT, dequantize(codes))


@needs_compiler
def test_both_forms_give_the_same_attention():
    keys, values = packed(512, 64, 4, 32, 2), packed(500, 64, 2, 32, 3)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=g) for h, n in ((6, 3), (2, 20), (2, 32)))
    pos = {"q_pos": torch.arange(529, 532).expand(2, -1), "k_pos": torch.arange(532).expand(2, 1, -1)}
    rules, outs = Rules(0.125, softcap=20.0, window=300), []
    for name in ("auto", "reference"):
        backend.use(name)
        assert form.serves(q, (keys, k), (values, v)) is (name == "auto")
        outs.append(attend_quantized(q, (keys, k), (values, v), rules, **pos))
    all_keys, all_values = (torch.cat((dequantize(a), b), 2) for a, b in ((keys, k), (values, v)))
    near(*outs, 2 * allowed(q, all_keys, rules, **pos, size=all_values))
    assert not torch.equal(*outs)  # two forms ran


@needs_compiler
def test_what_the_loops_are_not_written_for_stays_in_pytorch():
    k, v = torch.randn(1, 2, 4, 64), torch.randn(1, 2, 4, 24)
    codes, q = packed(32, 64, 4, 32, 2, B=1), torch.randn(1, 2, 1, 64)
    assert form.serves(q, (codes, k), (None, v))
    assert not form.serves(q, (codes, k), (packed(32, 24, 4, 8, 3, B=1), v))  # half a vector is left over
    assert not form.serves(q.requires_grad_(), (codes, k), (None, v))
    turned = Packed(codes.codes.mT, codes.scale, codes.offset, 4, 32, 2)
    assert not form.serves(q.detach(), (turned, k), (None, v))


@needs_compiler
def test_a_library_is_built_once_and_found_again(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", QUICK)
    assert compiled.library() is not None
    (built,) = fresh.iterdir()
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "_build", lambda *_: pytest.fail("it was there"))
    assert compiled.library() is not None and list(fresh.iterdir()) == [built]


@needs_compiler
def test_another_processor_gets_a_library_of_its_own(fresh, monkeypatch):
    command = compiled._compiler()
    before = compiled._key(command)
    monkeypatch.setattr(compiled, "_processor", lambda: "one without these vectors")
    assert compiled._key(command) != before


@needs_compiler
def test_two_at_once_do_not_spoil_each_other(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", QUICK)
    fresh.mkdir()
    path, command = fresh / "kernels.so", compiled._compiler()
    both = [threading.Thread(target=compiled._build, args=(command, path)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert list(fresh.iterdir()) == [path]


def test_without_a_compiler_all_runs_in_pytorch_without_a_word(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.library() is None
    assert compiled.name_on(CPU) == "reference"
    codes, k = packed(32, 64, 4, 32, 2, B=1), torch.randn(1, 2, 4, 64)
    assert not form.serves(torch.randn(1, 2, 1, 64), (codes, k), (None, k))


def test_a_compiler_that_fails_is_told_of_once(fresh, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    with pytest.warns(UserWarning, match=r"kernels run in PyTorch, their C\+\+ forms cannot be built: .*false"):
        assert compiled.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.library() is None
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_a_folder_that_cannot_be_written_does_not_matter(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert compiled.library() is not None


@needs_compiler
def test_the_record_names_the_form():
    assert compiled.name_on(CPU) == "compiled"
    backend.use("reference")
    assert compiled.name_on(CPU) == "reference"


@needs_compiler
def test_the_process_keeps_its_small_numbers():
    """Flags that flush them to zero would change every other number of the process."""
    code = (
        "import torch; from kernels import compiled; assert compiled.library() is not None; "
        "x = torch.tensor(1e-40); print(float(x * 1.0) > 0)"
    )
    root = Path(compiled.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=100)
    assert done.stdout.strip() == "True", done.stderr


def slots(counts: list[int], t: int, H: int, D: int, Dv: int) -> tuple:
    """Ragged pages and a tail of random slots: counts per row and head; heads lie between each other, in runs."""
    g = torch.Generator().manual_seed(sum(counts) + t)
    n = sum(counts)
    k, v = (torch.randn(n + 30, d, generator=g) for d in (D, Dv))  # places that are not used hold anything
    at = torch.randperm(n + 30, generator=g)[:n]
    for i in range(0, n - 20, 40):  # runs of 20 places
        at[i : i + 20] = at[i : i + 20].sort().values
    at[: n // 3] = at[: n // 3].sort().values
    pos = torch.randint(0, 900, (n + 30,), generator=g).int()
    pos[torch.randint(0, n + 30, (9,), generator=g)] = -1  # freed places
    held = torch.tensor(counts)
    pages = Pages(k, v, pos, at.int(), held.cumsum(0) - held, held, max(counts))
    B = len(counts) // H
    tail = *(torch.randn(B, H, t + 7, d, generator=g)[:, :, :t] for d in (D, Dv)), torch.arange(900, 900 + t)
    return pages, (*tail[:2], tail[2].int().expand(B, H, -1))


def off(q: torch.Tensor, pages: Pages, tail: tuple, size: float | None = None) -> float:
    """How far outputs over pages and tail, or numbers of a size, may be off: the largest |q| |k| bounds every logit."""
    k, v = (torch.cat((a.flatten(0, 2), b)) for a, b in zip(tail[:2], (pages.k, pages.v), strict=True))
    logit = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() * q.shape[-1] ** -0.5
    size = v.abs().max().item() if size is None else size
    return bound(torch.float32, len(k), logit, size=size, width=q.shape[-1])


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("counts", "t", "H", "G", "D", "Dv"),
    [
        ([16, 1, 40, 0], 5, 2, 3, 64, 64),
        ([0, 0], 1, 2, 1, 32, 16),
        ([700, 3], 0, 2, 4, 128, 128),
        ([63, 17, 16, 1, 0, 200], 20, 3, 8, 80, 80),
        ([130, 129], 150, 1, 2, 16, 16),
    ],
)
def test_pages_and_tail_are_one_softmax(counts, t, H, G, D, Dv, window, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pages, tail = slots(counts, t, H, D, Dv)
    B, rules = len(counts) // H, Rules(D**-0.5, window=window)
    q, q_pos = torch.randn(B, H * G, 1, D) * 3, torch.tensor([[900 + t, 905]])[:, :B].int().T
    assert attend_compiled.serves(q, pages, tail, rules)
    out, mass = attend_pages_with_mass(q, pages, tail, rules, q_pos=q_pos)
    assert torch.equal(out, attend_pages(q, pages, tail, rules, q_pos=q_pos))  # whichever thread comes first
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert torch.equal(out, attend_pages(q, pages, tail, rules, q_pos=q_pos))  # and however many there are
    backend.use("reference")
    expected, its_mass = attend_pages_with_mass(q, pages, tail, rules, q_pos=q_pos)
    near(out, expected, 2 * off(q, pages, tail))
    near(mass, its_mass, 2 * off(q, pages, tail, size=1.0))


@needs_compiler
def test_a_huge_logit_and_a_query_that_sees_nothing_stay_finite():
    pages, tail = slots([40, 0], 3, 1, 64, 64)
    pages.k[pages.at[18]], pages.pos[pages.at[18]] = 1e4, 7
    q, q_pos = torch.ones(2, 2, 1, 64), torch.tensor([[902], [-1]], dtype=torch.int32)
    out, mass = attend_pages_with_mass(q, pages, tail, Rules(1.0), q_pos=q_pos)
    assert torch.equal(out[0, :, 0], pages.v[pages.at[18]].expand(2, -1))  # all other weights are 0
    assert (out[1] == 0).all() and (mass[1] == 0).all()
    assert (mass[0, :, 18] == 1).all() and (mass[0].sum(-1) == 1).all()


@needs_compiler
def test_pages_under_rules_that_the_loops_do_not_know_stay_in_pytorch():
    pages, tail = slots([40, 20], 3, 2, 64, 64)
    q = torch.randn(1, 4, 1, 64)
    assert attend_compiled.serves(q, pages, tail, Rules(1.0, window=7))
    assert not attend_compiled.serves(q, pages, tail, Rules(1.0, softcap=5.0))
    assert not attend_compiled.serves(q, pages, tail, Rules(1.0, slopes=torch.ones(4)))
    assert not attend_compiled.serves(q.double(), pages, tail, Rules(1.0))
    assert not attend_compiled.serves(q, pages, tuple(x.mT.contiguous().mT for x in tail[:2]) + tail[2:], Rules(1.0))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(("S", "H", "G", "D", "Dv"), [(1, 2, 1, 64, 64), (63, 1, 8, 32, 16), (1000, 2, 3, 128, 80)])
def test_one_token_gives_its_output_and_its_attention(S, H, G, D, Dv, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    g = torch.Generator().manual_seed(S)
    q = torch.randn(2, H * G, 1, D, generator=g) * 2
    k, v = (torch.randn(2, H, S + 9, d, generator=g)[:, :, :S] for d in (D, Dv))
    q[0, 0, 0] = k[0, 0, S // 2] * 50  # one logit takes all
    rules, at = Rules(D**-0.5), {"q_pos": torch.full((2, 1), S), "k_pos": torch.arange(S).expand(2, 1, -1)}
    assert mass_compiled.serves(q, k, v, rules, 1, "tail")
    out, mass = attend_with_mass(q, k, v, rules, 1, **at, layout="tail")
    backend.use("reference")
    expected, its_mass = attend_with_mass(q, k, v, rules, 1, **at, layout="tail")
    near(out, expected, 2 * allowed(q, k, rules, **at, size=v))
    near(mass, its_mass, 2 * allowed(q, k, rules, **at))
    near(mass.sum(-1), 1.0, allowed(q, k, rules, **at))
