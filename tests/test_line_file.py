"""Whole lines in a file: full disks, limits, interrupts, other runs, pipes and devices."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys

import pytest

from stars.errors import RequestError
from stars.line_file import LineFile, check_writable, identity, open_lines, same_file

KEPT = b'{"a": 1}\n{"a": 2}\n'


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(KEPT)
    return path


@pytest.fixture
def failing_write(monkeypatch):
    """failing_write(count, error): `count` bytes more are written, then `error` is raised."""
    real = os.write

    def install(count: int, error: BaseException) -> None:
        left = [count]

        def write(fd: int, data) -> int:
            if left[0] == 0:
                raise error
            written = real(fd, bytes(data[: left[0]]))
            left[0] -= written
            return written

        monkeypatch.setattr(os, "write", write)

    return install


def test_lines_are_appended_to_what_is_there(path):
    with LineFile(path) as file:
        file.write("é\n")
        file.write("a\nb\n")
    assert path.read_bytes() == KEPT + "é\na\nb\n".encode()


def test_clear_empties_a_file_of_its_own(path):
    with LineFile(path) as file:
        file.write("three\n")
        file.clear()
        file.write("one\n")
        assert file.size() == 4
    assert path.read_bytes() == b"one\n"


def test_a_line_is_one_write(path, monkeypatch):
    calls, real = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(len(data)) or real(fd, data))
    with LineFile(path) as file:
        file.write("x" * 1_000_000 + "\n")
    assert calls == [1_000_001]


def test_a_short_write_goes_on(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    with LineFile(path) as file:
        file.write("0123456789\n")
    assert path.read_bytes() == KEPT + b"0123456789\n"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_full_disk_leaves_the_lines_before(path, failing_write, count):
    with LineFile(path, "make room") as file:
        failing_write(count, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError) as caught:
            file.write("0123456789\n")
    assert path.read_bytes() == KEPT
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert caught.value.strerror == "No space left on device: make room"


def test_an_interrupt_leaves_the_lines_before(path, failing_write):
    with LineFile(path) as file:
        failing_write(4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            file.write("0123456789\n")
    assert path.read_bytes() == KEPT


def test_a_size_limit_leaves_the_lines_before(path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with LineFile(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(KEPT) + 7, before[1]))
        try:
            with pytest.raises(OSError) as caught:  # Python ignores SIGXFSZ, so the write itself fails
                file.write("0123456789\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == KEPT
        file.write("more\n")  # and there is nothing between
    assert path.read_bytes() == KEPT + b"more\n"


def test_a_redirected_stdout_is_cut_back_but_never_emptied(path):
    """A shell's >> and >: nothing before is lost, a failure leaves whole lines, and what follows joins on."""
    program = (
        "import os, sys, resource\nfrom stars.line_file import LineFile\n"
        "file = LineFile(sys.argv[1]); file.clear(); file.write('one\\n')\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))\n"
        "try: file.write('0123456789\\n')\n"
        "except OSError: pass\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "os.write(1, b'end\\n')\n")
    for mode, kept in (("a", KEPT), ("w", b"")):
        for name in ("/dev/stdout", "-"):
            path.write_bytes(KEPT)
            with open(path, mode) as stdout:
                subprocess.run([sys.executable, "-c", program, name, str(len(kept) + 7)], stdout=stdout, check=True)
            assert path.read_bytes() == kept + b"one\nend\n"


def test_two_runs_cannot_write_one_file(path):
    with LineFile(path) as file:
        with pytest.raises(RequestError, match="another run"):
            LineFile(path)
        file.replace([b"new\n"])  # the file that takes its place is taken as well
        with pytest.raises(RequestError, match="another run"):
            LineFile(path)
        file.write("line\n")
    with LineFile(path) as file:
        file.write("later\n")
    assert path.read_bytes() == b"new\nline\nlater\n"


def test_replace_keeps_mode_and_links(path, tmp_path):
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    with LineFile(link) as file:
        file.replace(iter([b"one\n", b"two\n"]))
        file.write("three\n")
    assert link.is_symlink() and path.read_bytes() == b"one\ntwo\nthree\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "rows.jsonl"]


def test_replace_that_fails_leaves_the_old_lines(path, tmp_path):
    def lines():
        yield b"one\n"
        raise KeyboardInterrupt

    (tmp_path / "rows.jsonl.stars-tmp").write_bytes(b"left by a kill")
    with LineFile(path) as file:
        with pytest.raises(KeyboardInterrupt):
            file.replace(lines())
        file.write("next\n")
    assert path.read_bytes() == KEPT + b"next\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_pipes_and_devices_take_lines(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with LineFile(fifo) as file, LineFile(fifo) as second:
        for each in (file, second):
            each.clear()
            each.write("line\n")
    assert os.read(reader, 100) == b"line\nline\n"
    os.close(reader)
    with LineFile("/dev/null") as file:
        file.clear()
        file.write("line\n")
    with LineFile("/dev/full") as file, pytest.raises(OSError, match="No space left") as caught:
        file.write("line\n")
    assert caught.value.filename == "/dev/full"


def test_a_reader_that_went_away_is_a_broken_pipe(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with LineFile(fifo) as file:
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            file.write("line\n")


def test_a_replaced_stdout_takes_lines(capsys):
    with open_lines("-") as file:
        file.clear()
        file.write("line\n")
        assert file.size() == 0
    assert capsys.readouterr().out == "line\n"


def test_writable_is_known_without_touching(path, tmp_path):
    for good in (path, tmp_path / "new", "-", "/dev/null", "/dev/stdout"):
        check_writable(good)
    assert not (tmp_path / "new").exists() and path.read_bytes() == KEPT
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "absent" / "x")
    for bad, number in ((tmp_path, errno.EISDIR), (tmp_path / "absent" / "x", errno.ENOENT), (dangling, errno.ENOENT),
                        (path / "x", errno.ENOENT), ("", errno.ENOENT)):
        with pytest.raises(OSError) as caught:
            check_writable(bad)
        assert (caught.value.errno, caught.value.filename) == (number, str(bad))


def test_writable_asks_for_the_permission(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may write everywhere
    for bad in (path, tmp_path / "new"):
        with pytest.raises(PermissionError) as caught:
            check_writable(bad)
        assert caught.value.filename == str(bad)


def test_one_file_by_any_name(path, tmp_path):
    (tmp_path / "soft").symlink_to(path)
    os.link(path, tmp_path / "hard")
    for name in (path, f"{tmp_path}/./rows.jsonl", tmp_path / "soft", tmp_path / "hard"):
        assert same_file(str(path), str(name))
    with open(tmp_path / "hard") as file:
        assert same_file(file.fileno(), str(path))
    assert same_file(str(tmp_path / "new"), f"{tmp_path}/../{tmp_path.name}/new")
    (tmp_path / "other").write_bytes(KEPT)
    assert not same_file(str(path), str(tmp_path / "other")) and not same_file(str(tmp_path / "a"), str(tmp_path / "b"))
    assert identity("/dev/null") is None and not same_file("/dev/null", "/dev/null")
