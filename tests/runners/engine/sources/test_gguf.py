"""GGUF files: read as transformers reads them, kept, and refused by name where that would be another model."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from methods.core import artefacts
from methods.core.errors import UserError
from methods.core.home import cache_folder, hashes
from runners.cells import Run
from runners.engine.loading import checkpoint_of, find, load_model, load_tokenizer
from runners.engine.sources import gguf as reading
from runners.engine.sources.gguf_header import read
from runners.settings.check import check_config
from runners.settings.parts import task_of
from tests.runners.engine.sources.gguf_files import TEMPLATE, write_gguf
from tests.wrong.values import composed

CPU = torch.device("cpu")
TEXT = "the cat sat on 2024\n\n12 mats"


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_model_dir):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf", tiny_model_dir)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, file):
    """A cache in which the file was converted once, to float32."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFRONTIER_CACHE", str(folder))
        load_model(find(str(file)), torch.float32, CPU)
    return folder


@pytest.fixture
def cache(tmp_path, filled, monkeypatch):
    """A copy of that cache, for this test alone."""
    monkeypatch.setenv("KVFRONTIER_CACHE", str(shutil.copytree(filled, tmp_path / "cache")))
    return tmp_path / "cache"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "empty"))
    return tmp_path / "empty"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def read_directly(file):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_a_gguf_file_answers_as_transformers_reads_it(cache, file):
    checkpoint = find(str(file))
    model = load_model(checkpoint, torch.float32, CPU)
    assert torch.equal(logits(model), logits(read_directly(file)))
    assert not model.training and checkpoint.window == 2048 and checkpoint.ends == {2}
    assert checkpoint.name == "tiny.Q4_1" and checkpoint.files.keys() >= {"config.json", "tokenizer.json"}
    assert artefacts.model_id(model) == "tiny.Q4_1"


def test_tokenizer_and_chat_template_are_the_files_own(cache, file, tiny_tokenizer):
    (file.parent / "tokenizer_config.json").write_text('{"chat_template": "wrong"}')
    (file.parent / "chat_template.jinja").write_text("wrong")
    tokenizer = load_tokenizer(find(str(file)))
    assert tokenizer(TEXT).input_ids == tiny_tokenizer(TEXT).input_ids
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "</s>"


def test_unquantized_weights_come_out_as_they_went_in(empty, tmp_path, tiny_model_dir):
    model = load_model(find(str(write_gguf(tmp_path / "tiny.gguf", tiny_model_dir, "F32"))), torch.float32, CPU)
    assert torch.equal(logits(model), logits(load_model(find(str(tiny_model_dir)), torch.float32, CPU)))


def test_a_second_start_reads_what_the_first_one_made(cache, file, monkeypatch):
    for name in ("_describe", "_dequantize", "_header"):
        monkeypatch.setattr(reading, name, lambda *a: pytest.fail("made again"))
    monkeypatch.setattr(reading, "find_spec", lambda name: None)  # nor is the package needed
    assert load_model(find(str(file)), torch.float32, CPU).dtype == torch.float32


def test_a_copy_under_another_name_in_another_folder_has_its_own_conversion_of_the_same_weights(cache, file, tmp_path):
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert find(str(copy)).weights == find(str(file)).weights
    assert find(str(copy)).folder != find(str(file)).folder


def test_the_cache_keeps_the_runs_dtype_and_says_where_it_lies(cache, file, capsys):
    checkpoint = find(str(file))
    model = load_model(checkpoint, torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16
    sizes = {
        name: (checkpoint.folder.with_name(name) / "model.safetensors").stat().st_size
        for name in ("bfloat16", "float32")
    }
    assert sizes["bfloat16"] < 0.7 * sizes["float32"]
    said = capsys.readouterr().err
    assert f"tiny.Q4_1.gguf (Q4_1) dequantized to bfloat16: 0 MB in {cache}" in said


def spoil(path):
    """Other bytes, in a file of the same size."""
    size = path.stat().st_size
    path.write_bytes(b"x" * size)


@pytest.mark.parametrize(
    ("name", "harm"), [("model.safetensors", "cut"), ("model.safetensors", "spoilt"), ("config.json", "gone")]
)
def test_a_cache_that_was_damaged_is_made_again(cache, file, name, harm, monkeypatch):
    checkpoint = find(str(file))
    expected = logits(load_model(checkpoint, torch.float32, CPU))
    monkeypatch.setattr(hashes, "LEAST", 0)  # the file's hash is kept, as a large one's is
    load_model(find(str(file)), torch.float32, CPU)
    for place in {checkpoint.folder, checkpoint.folder.with_name("float32")}:
        if (path := place / name).exists():
            {"cut": lambda p: os.truncate(p, 9), "spoilt": spoil, "gone": os.unlink}[harm](path)
    assert torch.equal(logits(load_model(find(str(file)), torch.float32, CPU)), expected)


def test_two_that_start_at_once_make_it_once(empty, file, monkeypatch):
    made = []

    def slowly(path, file, draft):
        made.append(draft)
        time.sleep(0.2)
        (draft / "config.json").write_text("{}")

    monkeypatch.setattr(reading, "_describe", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(reading.checkpoint("x", file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(set(found)) == 1 and (found[0] / "config.json").is_file()
    assert [path.name for path in found[0].parent.iterdir() if path.suffix == ".draft"] == []


def test_a_conversion_that_is_stopped_leaves_nothing_that_is_taken_for_one(empty, file, monkeypatch):
    def stopped(*given):
        (given[-1] / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    checkpoint = find(str(file))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reading, "_dequantize", stopped)
        load_model(checkpoint, torch.float32, CPU)
    assert [path.name for path in checkpoint.folder.parent.iterdir() if "float32" in path.name] == [".float32.lock"]
    assert torch.equal(logits(load_model(checkpoint, torch.float32, CPU)), logits(read_directly(file)))


def test_more_than_4_gb_are_asked_for_before_they_are_written(empty, file, monkeypatch, capsys):
    checkpoint = find(str(file))
    monkeypatch.setattr(reading, "LARGE", 1000)
    with pytest.raises(UserError, match=r"0\.0 GB of weights in float32 would be written to .*model\.convert=always"):
        load_model(checkpoint, torch.float32, CPU)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: "n\n", raising=False)
    with pytest.raises(UserError, match=r"dtype=bfloat16 takes half of it"):
        load_model(checkpoint, torch.float32, CPU)
    assert "write them? [y/N]" in capsys.readouterr().err and not checkpoint.folder.with_name("float32").exists()
    monkeypatch.setattr("sys.stdin.readline", lambda: "y\n", raising=False)
    assert load_model(checkpoint, torch.float32, CPU).dtype == torch.float32
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    allowed = checkpoint_of({"path": str(file), "convert": "always"})
    assert load_model(allowed, torch.bfloat16, CPU).dtype == torch.bfloat16


def test_weights_that_the_disk_has_no_room_for_are_refused(empty, file, monkeypatch):
    checkpoint = find(str(file))
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"do not fit into .*KVFRONTIER_CACHE=DIR"):
        load_model(checkpoint, torch.float32, CPU)


def test_a_cache_that_cannot_be_written_is_named(file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*KVFRONTIER_CACHE=DIR"):
        find(str(file))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "mpt"}, r"cannot read a GGUF of architecture mpt as what it is \(.*\); give the folder of"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"it leaves out rope_freqs\.weight"),
        ({"settings": {"rope.scaling.type": "yarn"}}, r"it leaves out rope\.scaling\.type=yarn"),
        ({"settings": {"attention.key_length": 16.0}}, r"it leaves out attention\.key_length=16"),
        ({"settings": {"logit_scale": 0.5}}, r"it leaves out logit_scale=0\.5"),
        ({"pre": "poro"}, r"its text is cut as 'poro', which nothing here does"),
    ],
)
def test_a_file_that_would_be_read_as_another_model_is_refused(empty, tmp_path, tiny_model_dir, change, says):
    path = write_gguf(tmp_path / "other.gguf", tiny_model_dir, **change)
    with pytest.raises(UserError, match=says) as caught:
        find(str(path))
    assert str(caught.value).startswith(f"model.path={path}: ") and len(str(caught.value).splitlines()) == 1


def test_settings_that_change_nothing_are_no_reason_to_refuse(empty, tmp_path, tiny_model_dir):
    settings = {"rope.scaling.type": "none", "attention.key_length": 8.0, "attention.value_length": 8.0}
    assert find(str(write_gguf(tmp_path / "same.gguf", tiny_model_dir, settings=settings))).window == 2048


def test_text_is_cut_before_digits_where_the_file_says_so(empty, tmp_path, tiny_model_dir):
    path = write_gguf(tmp_path / "digits.gguf", tiny_model_dir, pre="smollm")
    cut = load_tokenizer(find(str(path))).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [piece for piece, _ in cut] == ["a", "ĊĊ", "1", "2"]


def test_a_file_that_is_cut_short_or_none_or_missing_is_named(empty, tmp_path, file):
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"short\.gguf is no whole GGUF file"):
        find(str(short))
    short.write_text("text")
    with pytest.raises(UserError, match=r"short\.gguf: is a file, and no GGUF file"):
        find(str(short))
    with pytest.raises(UserError, match=r"gone\.gguf: no such file"):
        find(str(tmp_path / "gone.gguf"))


def test_one_part_of_several_is_refused(empty, file, monkeypatch):
    whole = read(file)
    monkeypatch.setattr(reading.headers, "read", lambda path: type(whole)(**{**vars(whole), "parts": 3}))
    with pytest.raises(UserError, match=r"is one of 3 parts; llama-gguf-split --merge"):
        find(str(file))


def test_without_the_package_the_extra_is_named(empty, file, monkeypatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kvfrontier\[gguf\]' brings it"):
        find(str(file))


def test_a_folder_names_the_file_where_it_has_several(cache, file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "a.gguf")
    assert find(str(folder)).name == "a"
    shutil.copy(file, folder / "b.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files; name one, such as model\.file=a\.gguf"):
        find(str(folder))
    assert checkpoint_of({"path": str(folder), "file": "b.gguf"}).name == "b"
    with pytest.raises(UserError, match=r"model\.file=c\.gguf: no such file.*there: a\.gguf, b\.gguf"):
        find(str(folder), file="c.gguf")
    with pytest.raises(UserError, match=r"model\.file=b\.gguf: .* is a file"):
        find(str(folder / "a.gguf"), file="b.gguf")
    with pytest.raises(UserError, match=r"model\.file=x\.gguf"):
        find("someone/some-model", file="x.gguf")


def test_a_record_says_what_the_weights_were_dequantized_from(cache, file, tmp_path):
    cfg = composed(f"model.path={file}", "method=full", "task=needle", "task.limit=1", "task.kinds=[passkey]")
    check_config(cfg)
    run = Run(cfg, task_of(cfg), tmp_path, "full")
    assert run.cell.notes["dequantized_from"].keys() == {"Q4_1", "F32"}
    assert run.cell.notes["dequantized_from"]["Q4_1"] > 0.99
    assert run.cell.conditions["weights"] == find(str(file)).weights
    assert "dtype=float32 (from Q4_1), " in run.settings([])
    assert run.cell.record.folder.is_relative_to(tmp_path / "tiny.Q4_1")


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("KVFRONTIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kvfrontier"
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
