"""Fetching from a server on this machine: broken connections, wrong files, dead mirrors, several processes."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
from mirror_server import CONTENT, Server

from evodiff.checkpoints import fetch as module
from evodiff.checkpoints import registry, require
from evodiff.checkpoints.fetch import fetch
from evodiff.checkpoints.integrity import check
from evodiff.cli import main
from evodiff.errors import CheckpointError, ConfigError, StoreError

SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def entry(tmp_path, monkeypatch, server):
    """Write the one entry of a registry; returns a function that changes it and gives the path of its file."""
    manifest = tmp_path / "root" / "checkpoints" / "manifest.yaml"
    manifest.parent.mkdir(parents=True)
    monkeypatch.setattr(registry, "MANIFEST", manifest)
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVODIFF_OFFLINE", raising=False)

    def make(*urls, **fields):
        base = {"kind": "model", "file": "weights.bin", "licence": "MIT", "urls": [server.url(url) for url in urls]}
        manifest.write_text(json.dumps({"thing": base | fields}))
        registry._read.cache_clear()
        return tmp_path / "cache" / "thing" / "weights.bin"

    yield make
    registry._read.cache_clear()


def left(path):
    """What a fetch left beside the file it is for, besides its lock and its record."""
    return sorted(p.name for p in path.parent.iterdir() if p.name not in (".locks", "weights.bin.fetched.json"))


def test_a_file_is_fetched_whole_and_only_once(entry, server):
    path = entry("/a", sha256=SHA, bytes=len(CONTENT))
    server.replies["/a"] = [{}]
    seen = []
    with pytest.raises(ConfigError, match=r"evodiff fetch thing.*--from PATH"):
        require("thing")
    assert fetch("thing", advance=lambda done, total: seen.append((done, total))) == path
    assert path.read_bytes() == CONTENT and left(path) == ["weights.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert fetch("thing") == require("thing") == path
    assert len(server.seen) == 1


def test_a_damaged_file_in_its_place_is_told_and_left(entry, server, capsys):
    path = entry("/a")
    server.replies["/a"] = [{}]
    assert main(["fetch", "thing"]) == 0
    path.write_bytes(b"damaged!")
    assert main(["fetch", "thing"]) == 1
    assert f"{path} is not thing: it has 8 bytes, expected {len(CONTENT):,}. Delete it" in capsys.readouterr().err
    assert path.read_bytes() == b"damaged!" and len(server.seen) == 1


def test_a_truncated_download_goes_on_where_it_stopped(entry, server):
    path = entry("/a")
    server.replies["/a"] = [{"etag": '"1"', "cut": 100_000}, {"etag": '"1"', "cut": 300_000}, {"etag": '"1"'}]
    fetch("thing")
    assert path.read_bytes() == CONTENT and left(path) == ["weights.bin"]
    assert server.ranges() == [None, "bytes=100000-", "bytes=300000-"]


def test_a_mirror_that_always_breaks_off_is_left_for_the_next(entry, server):
    path = entry("/a", "/b", sha256=SHA)
    server.replies["/a"] = [{"cut": 100_000}]
    server.replies["/b"] = [{}]
    fetch("thing")
    assert path.read_bytes() == CONTENT
    assert [request["path"] for request in server.seen] == ["/a"] * (1 + module.ATTEMPTS) + ["/b"]
    assert server.seen[-1]["range"] == "bytes=100000-"  # the hash is known: any mirror may continue


def test_a_mirror_that_starts_over_and_breaks_off_for_ever_is_given_up(entry, server):
    """The second answer is shorter than the first, so the third brings more than it, but nothing new."""
    path = entry("/a", "/b")
    server.replies["/a"] = [{"cut": size} for size in (60_000, 30_000) * 10]
    server.replies["/b"] = [{}]
    fetch("thing")
    asked = [request["path"] for request in server.seen]
    assert path.read_bytes() == CONTENT and asked == ["/a"] * (1 + module.ATTEMPTS) + ["/b"]


def test_what_another_mirror_began_is_not_continued_without_a_hash(entry, server):
    path = entry("/a", "/b")
    server.replies["/a"] = [{"cut": 100_000, "etag": '"1"'}]
    server.replies["/b"] = [{"content": CONTENT[::-1], "etag": '"1"'}]
    fetch("thing")
    assert path.read_bytes() == CONTENT[::-1] and server.seen[-1]["range"] is None


def test_a_truncated_file_is_never_placed_but_kept_to_go_on(entry, server, capsys):
    path = entry("/a", page="https://example.org/folder")
    server.replies["/a"] = [{"cut": 1000, "etag": '"1"'}]
    assert main(["fetch", "thing"]) == 1
    said = capsys.readouterr().err
    assert "broke off after 1,000 of 524,288 bytes" in said and "https://example.org/folder" in said
    assert "--from PATH" in said and len(said.strip().splitlines()) == 1
    assert left(path) == ["weights.bin.part", "weights.bin.part.json"]
    server.replies["/a"] = [{"etag": '"1"'}]
    assert main(["fetch", "thing"]) == 0
    assert path.read_bytes() == CONTENT and server.ranges()[-1] == "bytes=1000-" and left(path) == ["weights.bin"]


def test_a_file_system_without_locks_is_told(entry, server, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    entry("/a")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match="without locks .*EVODIFF_CACHE for weights"):
        fetch("thing")
    assert not server.seen


def test_a_file_that_changed_on_the_server_is_fetched_anew(entry, server):
    path = entry("/a")
    server.replies["/a"] = [{"cut": 1000, "etag": '"1"'}, {"etag": '"2"', "content": CONTENT[::-1]}]
    fetch("thing")
    assert server.seen[1]["condition"] == '"1"'
    assert path.read_bytes() == CONTENT[::-1]


def test_a_weak_tag_does_not_promise_the_same_bytes(entry, server):
    path = entry("/a")
    weak = {"etag": 'W/"1"'}
    server.replies["/a"] = [{**weak, "cut": 1000}, {**weak, "content": CONTENT[::-1]}]
    fetch("thing")
    assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("second", [{"ranges": False}, {"etag": 'W/"1"'}, {}])
def test_a_server_without_ranges_or_tags_starts_over(entry, server, second):
    path = entry("/a")
    server.replies["/a"] = [{**second, "cut": 1000}, second]
    fetch("thing")
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_only_checked(entry, server):
    path = entry("/a", sha256=SHA, bytes=len(CONTENT))
    server.replies["/a"] = [{}]
    path.parent.mkdir(parents=True)
    path.with_name("weights.bin.part").write_bytes(CONTENT)
    fetch("thing")
    assert path.read_bytes() == CONTENT and server.ranges() == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_thrown_away(entry, server):
    path = entry("/a", sha256=SHA)
    server.replies["/a"] = [{}]
    path.parent.mkdir(parents=True)
    path.with_name("weights.bin.part").write_bytes(CONTENT + b"more")
    fetch("thing")
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_wrong_is_fetched_once_more_from_the_start(entry, server):
    path = entry("/a", sha256=SHA)
    server.replies["/a"] = [{}]
    path.parent.mkdir(parents=True)
    path.with_name("weights.bin.part").write_bytes(b"\x99" * 1000)
    fetch("thing")
    assert path.read_bytes() == CONTENT and server.ranges() == ["bytes=1000-", None]


@pytest.mark.parametrize(
    "fields", [{"sha256": SHA[::-1]}, {"sha256": "00000000"}, {"md5": "0" * 32}, {"bytes": len(CONTENT) + 1}]
)
def test_a_wrong_file_is_refused_and_the_next_mirror_tried(entry, server, fields):
    path = entry("/a", "/b", **fields)
    server.replies["/a"] = server.replies["/b"] = [{}]
    with pytest.raises(CheckpointError, match=r"could not be fetched.*expected") as raised:
        fetch("thing")
    assert str(raised.value).count("http://127.0.0.1") == 2
    assert left(path) == []


def test_a_file_of_another_size_is_not_even_begun(entry, server):
    entry("/a", bytes=len(CONTENT) + 1)
    server.replies["/a"] = [{}]
    with pytest.raises(CheckpointError, match="another file, of 524,288 bytes; expected 524,289"):
        fetch("thing", advance=lambda done, total: pytest.fail("downloaded"))


def test_the_first_digits_of_a_hash_are_enough(entry, server):
    path = entry("/a", "/b", sha256=SHA[:8])
    server.replies["/a"] = [{"content": CONTENT[::-1]}]
    server.replies["/b"] = [{}]
    fetch("thing")
    assert path.read_bytes() == CONTENT


def test_missing_then_the_mirror(entry, server):
    path = entry("/gone", "/broken", "/b", sha256=SHA)
    server.replies["/broken"] = [{"status": 403}]
    server.replies["/b"] = [{}]
    fetch("thing")
    assert path.read_bytes() == CONTENT
    assert [request["path"] for request in server.seen] == ["/gone", "/broken", "/b"]


def test_a_busy_mirror_is_asked_again_a_little_later(entry, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    path = entry("/a", sha256=SHA)
    server.replies["/a"] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "7"}}, {}]
    fetch("thing")
    assert path.read_bytes() == CONTENT and pauses == [module.PAUSE, 7]


def test_a_mirror_that_stays_busy_is_given_up(entry, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    entry("/a")
    server.replies["/a"] = [{"status": 503, "headers": {"Retry-After": "86400"}}]
    with pytest.raises(CheckpointError, match="HTTP 503"):
        fetch("thing")
    assert len(server.seen) == module.ATTEMPTS and pauses == [module.LONGEST_PAUSE] * (module.ATTEMPTS - 1)


def test_nobody_answers(entry, server):
    entry("/gone")
    with pytest.raises(CheckpointError, match="HTTP 404"):
        fetch("thing")
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match="refused"):
        fetch("thing")


@pytest.mark.parametrize(
    "reply",
    [{"type": "text/html; charset=utf-8", "content": b"Quota exceeded"}, {"content": b"\n<!DOCTYPE html><html>"}],
)
def test_a_web_page_is_not_taken_for_the_file(entry, server, reply):
    path = entry("/a")
    server.replies["/a"] = [reply]
    with pytest.raises(CheckpointError, match="web page"):
        fetch("thing")
    assert not path.exists()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"partial": 206}, "other parts of the file"),
        ({"content": b""}, "ended after 0 bytes of some 100 MB"),
        ({"headers": {"Content-Length": None}}, "ended after 524,288 bytes of some 100 MB"),
        ({"headers": {"Content-Encoding": "gzip"}}, "in another form .gzip"),
        ({}, r"another file: it has 0\.5 MB, and the published file some 100 MB"),
    ],
)
def test_an_answer_that_cannot_be_the_file_is_refused_without_a_hash(entry, server, reply, message):
    path = entry("/a", mb=100)
    server.replies["/a"] = [reply]
    with pytest.raises(CheckpointError, match=message):
        fetch("thing")
    assert not path.exists() and len(server.seen) <= 1 + module.ATTEMPTS


@pytest.mark.parametrize(("size", "message"), [(300_000, "ended after 300,000"), (1_200_000, "it has 1.2 MB")])
def test_without_a_length_or_a_hash_the_size_that_the_manifest_states_decides(entry, server, size, message):
    path = entry("/a", mb=1)
    reply = {"headers": {"Content-Length": None}}
    server.replies["/a"] = [reply | {"content": bytes(size)}]
    with pytest.raises(CheckpointError, match=message):
        fetch("thing")
    assert not path.exists()
    server.replies["/a"] = [reply | {"content": bytes(950_000)}]
    assert fetch("thing").stat().st_size == 950_000


def test_an_address_that_is_none_does_not_stop_the_next(entry, server):
    path = entry("/a")
    manifest = json.loads(registry.MANIFEST.read_text())
    manifest["thing"]["urls"].insert(0, "weights.bin")
    registry.MANIFEST.write_text(json.dumps(manifest))
    registry._read.cache_clear()
    server.replies["/a"] = [{}]
    fetch("thing")
    assert path.read_bytes() == CONTENT


def test_one_dead_link_does_not_stop_the_others(entry, server, capsys):
    path = entry("/a")
    manifest = json.loads(registry.MANIFEST.read_text())
    manifest = {"dead": {**manifest["thing"], "urls": [server.url("/gone")]}, **manifest}
    registry.MANIFEST.write_text(json.dumps(manifest))
    registry._read.cache_clear()
    server.replies["/a"] = [{}]
    assert main(["fetch", "dead", "thing"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 files could not be fetched: dead" in said.err and "thing:" in said.out
    assert path.read_bytes() == CONTENT


def test_drive_links_become_direct_ones(entry, server, monkeypatch):
    path = entry()
    manifest = registry.MANIFEST
    manifest.write_text(manifest.read_text().replace('"urls": []', '"urls": ["drive:1R_H-f"]'))
    registry._read.cache_clear()
    monkeypatch.setattr(module, "DRIVE", server.url("/download?id={id}&confirm=t"))
    server.replies["/download?id=1R_H-f&confirm=t"] = [{}]
    fetch("thing")
    assert path.read_bytes() == CONTENT


def test_what_only_a_browser_can_download_is_explained(entry, server):
    entry(page="https://drive.google.com/drive/folders/1xYj")
    with pytest.raises(
        ConfigError, match=r"open https://drive\.google\.com/drive/folders/1xYj in a browser.*--from PATH"
    ):
        fetch("thing")


def test_offline(entry, server, tmp_path, monkeypatch):
    path = entry("/a", sha256=SHA)
    server.replies["/a"] = [{}]
    monkeypatch.setenv("EVODIFF_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"EVODIFF_OFFLINE is set.*--from PATH"):
        fetch("thing")
    copy = tmp_path / "copy.bin"
    copy.write_bytes(CONTENT)
    assert main(["fetch", "thing", "--from", str(copy)]) == 0
    assert path.read_bytes() == CONTENT and server.seen == []
    assert fetch("thing") == path  # what is here needs no network


def test_a_wrong_copy_is_refused_and_changes_nothing(entry, tmp_path):
    path = entry("/a", sha256=SHA)
    copy = tmp_path / "copy.bin"
    copy.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"is not weights\.bin of thing.*expected"):
        fetch("thing", copy)
    with pytest.raises(ConfigError, match="no such file"):
        fetch("thing", tmp_path / "absent")
    assert left(path) == []


def test_a_copy_of_another_size_is_taken_with_a_remark_and_replaces_what_was_begun(entry, server, tmp_path, capsys):
    path = entry("/a", mb=100)
    server.replies["/a"] = [{"content": bytes(100_000_000), "cut": 1000, "etag": '"1"'}]
    with pytest.raises(CheckpointError):
        fetch("thing")
    assert left(path) == ["weights.bin.part", "weights.bin.part.json"]
    copy = tmp_path / "copy.bin"
    copy.write_bytes(CONTENT)
    assert main(["fetch", "thing", "--from", str(copy)]) == 0
    said = capsys.readouterr().err
    assert "thing: it has 0.5 MB, and the published file some 100 MB" in said and said.count("\n") == 1
    assert left(path) == ["weights.bin"]


def test_a_full_disk_is_said_before_the_download(entry, server, monkeypatch):
    path = entry("/a")
    server.replies["/a"] = [{}]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(StoreError, match=r"0\.0 GB left.*EVODIFF_CACHE"):
        fetch("thing")
    assert not path.exists()


def test_a_cache_that_cannot_be_written(entry, server, tmp_path, monkeypatch):
    entry("/a")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="EVODIFF_CACHE"):
        fetch("thing")


def test_damage_shows_later_even_without_a_published_hash(entry, server):
    path = entry("/a")
    server.replies["/a"] = [{}]
    fetch("thing")
    thing = registry.find("thing")
    assert check(thing, path) is None
    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    path.write_bytes(damaged)
    assert "sha256" in check(thing, path)
    assert check(thing, path, hashes=False) is None
    path.write_bytes(CONTENT[:-1])
    assert "bytes" in check(thing, path, hashes=False)


def test_a_hash_that_only_others_reported_is_a_remark(entry, server, capsys):
    path = entry("/a", sha256_reported="0" * 64)
    server.replies["/a"] = [{}]
    assert main(["fetch", "thing"]) == 0
    assert f"sha256 is {SHA}" in capsys.readouterr().err
    assert path.read_bytes() == CONTENT


# --- several processes --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from evodiff.checkpoints.fetch import fetch
fetch("thing", advance=lambda done, total: done >= int(sys.argv[1]) and os.kill(os.getpid(), signal.SIGKILL))
"""


def process(tmp_path, code, *argv):
    environment = {**os.environ, "EVODIFF_ROOT": str(tmp_path / "root"), "EVODIFF_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *argv], env=environment, **pipes)


def test_two_processes_fetch_one_file(entry, server, tmp_path):
    path = entry("/a", sha256=SHA)
    go = threading.Event()
    server.replies["/a"] = [{"hold": go}]
    command = "import sys; from evodiff.cli import main; sys.exit(main(['fetch', 'thing']))"
    first = process(tmp_path, command)
    assert server.arrived.wait(30)  # so the first has the lock
    second = process(tmp_path, command)
    assert "another process is fetching it" in second.stderr.readline()
    go.set()
    assert [p.communicate()[0] and p.returncode for p in (first, second)] == [0, 0]
    assert path.read_bytes() == CONTENT and len(server.seen) == 1


def test_a_process_killed_half_way_is_continued_by_the_next(entry, server, tmp_path):
    path = entry("/a")
    server.replies["/a"] = [{"etag": '"1"', "cut": 300_000}, {"etag": '"1"'}]
    killed = process(tmp_path, KILLED, "300000")
    killed.communicate()
    assert killed.returncode == -9
    assert not path.exists() and path.with_name("weights.bin.part").stat().st_size == 300_000
    fetch("thing")  # the lock went with the process
    assert path.read_bytes() == CONTENT and server.ranges() == [None, "bytes=300000-"]
