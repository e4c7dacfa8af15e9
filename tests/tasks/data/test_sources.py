import http.server
import json
import socket
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from methods.core.errors import UserError
from tasks.data import sources
from tasks.data.sources import expand, from_hub, hub_commit, locate, parse_rows, unreachable


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_folder_offers_its_jsonl_files(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(b"one")
    (tmp_path / "notes.txt").write_bytes(b"two")
    found = locate(tmp_path)
    assert list(found) == ["qasper"]
    assert found["qasper"].read() == b"one"


def test_a_folder_may_keep_them_in_data_or_in_data_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", "zipped")
        archive.writestr("data/README.md", "no rows")
    assert {name: file.read() for name, file in locate(tmp_path).items()} == {"lcc": b"zipped"}
    assert locate(tmp_path / "data.zip")["lcc"].where.endswith("data.zip:data/lcc.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lcc.jsonl").write_bytes(b"plain")
    assert locate(tmp_path)["lcc"].read() == b"plain"


def test_a_single_file_offers_itself(tmp_path):
    (tmp_path / "trec.jsonl").write_bytes(b"row")
    assert locate(tmp_path / "trec.jsonl")["trec"].read() == b"row"


def test_a_path_to_nothing_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"task\.data=nope: nothing at {tmp_path}/nope; put .*task\.data=bundled"):
        locate(Path("nope"))


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"no \.jsonl file in .*/data, and no data\.zip; put"):
        locate(tmp_path)


def test_a_broken_zip_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"data\.zip: not a zip file"):
        locate(tmp_path)


def test_a_zip_without_rows_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("README.md", "no rows")
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        locate(tmp_path)


def test_rows_survive_blank_lines_line_separators_and_a_byte_order_mark():
    row = {"context": "one\u2028two\x85"}
    raw = b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n" + b'{"context": "three"}'
    assert parse_rows(raw, "x.jsonl") == [row, {"context": "three"}]


@pytest.mark.parametrize("line", [b"{'a': 1}", b'{"a": 1', b'{"a": "\xff"}', b"NONE"])
def test_a_line_that_is_not_json_is_named_with_its_file(line):
    with pytest.raises(UserError, match=r"dir/x\.jsonl, line 3: not JSON"):
        parse_rows(b'{"a": 1}\n\n' + line + b"\n", "dir/x.jsonl")


def test_a_line_that_is_no_object_is_named_with_its_file():
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: a JSON object is needed, found list"):
        parse_rows(b"[1]", "x.jsonl")


@pytest.fixture
def empty_cache(monkeypatch):
    """A hub client whose cache is empty and whose download would be a mistake."""

    def get(*args, local_files_only, **kwargs):
        if not local_files_only:
            pytest.fail("asked the hub although it is out of reach")
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)


def test_the_hub_out_of_reach_fails_in_seconds_and_names_the_offline_way(empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    started = time.monotonic()
    with pytest.raises(UserError, match=r"from http://127\.0\.0\.1:9 \(.*refused\); offline, give task\.data=DIR"):
        from_hub("main")
    assert time.monotonic() - started < 5


def test_the_offline_switch_of_the_hub_is_obeyed_at_once(empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*task\.data=DIR"):
        from_hub("main")


def test_the_real_client_without_a_network_says_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"task\.revision=v1 is not in the cache"):
        from_hub("v1")


def test_a_cached_download_is_used_and_its_folder_is_its_commit(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: "/cache/snapshots/abc123/data.zip")
    assert hub_commit(from_hub("main")) == "abc123"


def test_a_revision_that_the_hub_does_not_have_is_named(monkeypatch):
    def get(*args, local_files_only, **kwargs):
        raise LocalEntryNotFoundError("not cached") if local_files_only else OSError("404\nRevision Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tasks.data.sources.unreachable", lambda url: None)
    with pytest.raises(UserError, match=r"task\.revision=old .*\(404\)"):
        from_hub("old")


def test_a_server_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        assert unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", 0.3)
        assert time.monotonic() - started < 3


def test_a_server_that_answers_with_an_error_is_reachable():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{server.server_port}") is None


def test_a_path_may_hold_a_tilde_or_a_variable(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert expand("~/lb") == expand("$HOME/lb") == Path("/users/me/lb")


def test_a_member_of_an_archive_is_not_unpacked_beyond_all_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_UNPACKED", 3 << 20)
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/lcc.jsonl", b"0" * (3 << 20))
        archive.writestr("data/trec.jsonl", b"0" * ((3 << 20) + 1))
    found = locate(tmp_path)
    assert len(found["lcc"].read()) == 3 << 20
    with pytest.raises(UserError, match=r"data/trec\.jsonl is larger than 3 MiB; unpack it, and give the folder"):
        found["trec"].read()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": "\\ud83d"}', '{"a": ' + "9" * 5000 + "}", "7", '"a"'])
def test_a_line_that_no_row_can_be_made_of_is_named_by_its_number(line):
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: ") as caught:
        sources.parse_rows(b'{"a": 1}\n' + line.encode(), "x.jsonl")
    assert len(str(caught.value).splitlines()) == 1


def test_a_whole_pair_is_a_letter(tmp_path):
    assert sources.parse_rows(b'{"a": "\\ud83d\\ude00"}', "x.jsonl") == [{"a": "\N{GRINNING FACE}"}]
