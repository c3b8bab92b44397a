"""Real processes: signals, terminals, pipes and standard input."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import headwater
from headwater.cli.progress import ByteReporter, Line, Reporter
from headwater.extractor.progress import Progress
from headwater.store.reader import open_run

COMMAND = [sys.executable, "-m", "headwater"]


def start(*arguments, **streams):
    kinds = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "stdin": subprocess.DEVNULL,
    } | streams
    return subprocess.Popen([*COMMAND, *map(str, arguments)], text=True, **kinds)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)


@pytest.fixture
def long(tiny_gpt2, tiny_text, tmp_path):
    """The arguments of an extraction of 24 blocks."""
    text = tmp_path / "long.txt"
    text.write_text(tiny_text.read_text() * 4)
    flags = [
        "--model",
        tiny_gpt2,
        "--text",
        text,
        "--preset",
        "statistics",
        "--block",
        1,
        "--max-sequences",
        24,
    ]
    return [*flags, "--out", tmp_path / "run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_that_then_goes_on(cli, long, number):
    ledger = Path(long[-1]) / "headwater/ledger"
    with start("extract", *long) as process:
        wait_for(lambda: ledger.is_dir() and len(list(ledger.iterdir())) >= 2, process)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    n_done = len(open_run(long[-1]).ledger.committed())
    last = f"headwater: interrupted. {n_done} of 24 blocks are kept in {long[-1]}: run the same command again to go on."
    assert 2 <= n_done < 24 and err.splitlines()[-1] == last and "Traceback" not in err
    assert cli("verify", long[-1]).code == 0
    resumed = cli("extract", *long)
    assert resumed.code == 0 and f"24 blocks, {n_done} done already" in resumed.err
    assert cli("verify", long[-1]).code == 0 and open_run(long[-1]).complete.all()


def test_standard_input_is_text_and_can_be_interrupted(tiny_gpt2, tiny_text, tmp_path):
    flags = [
        "extract",
        "--model",
        tiny_gpt2,
        "--text",
        "-",
        "--sites",
        "loss",
        "--out",
        tmp_path / "run",
    ]
    with start(*flags, stdin=subprocess.PIPE) as process:
        process.stdin.write("the fox")
        process.stdin.flush()
        wait_for((tmp_path / "run/headwater/unfinished").exists, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith(
        "Nothing was computed yet: run the same command again to start over."
    )
    with tiny_text.open() as file, start(*flags, stdin=file) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    run = open_run(tmp_path / "run")
    assert run.complete.all() and run.manifest.text["sources"][0]["path"] == "-"
    assert run.manifest.text["sources"][0]["size"] == len(tiny_text.read_text()) and out.startswith(
        str(run.path)
    )


def test_a_terminal_gets_one_line_that_is_redrawn(long):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with start("extract", *long, "--max-sequences", 6, "--json", stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while part := read(ours):
            shown += part
        out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0 and out.startswith("{")
    lines = shown.decode().rstrip("\r\n").split("\r\x1b[K")
    assert len(lines) >= 3 and lines[0] == ""
    assert lines[-1].startswith("6/6 blocks  ") and lines[-1].endswith(" gone, 0:00 left")
    assert max(map(len, lines)) < 60 and shown.endswith(b"\n")


@pytest.mark.parametrize("columns", [120, 80, 60, 40, 25])
def test_a_narrow_terminal_loses_the_bar_first_and_the_time_left_last(columns, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(Line, "_width", lambda self: columns - 1)
    reporter = Reporter(stream)
    progress = Progress("blocks", 1234, 0)
    reporter(progress)
    progress.started = time.perf_counter() - 100
    progress.done, progress.n_tokens, progress.n_bytes = 617, 10**6, 10**9
    progress.entry, progress.workers = object(), "8 workers"
    reporter._line._last = 0
    reporter(progress)
    line = stream.getvalue().split("\r\x1b[K")[-1]
    first = {120: "█", 25: "1:40 left"}.get(columns, "617/1,234 blocks  ")
    assert len(line) < columns and line.startswith(first)
    assert "1:40 left" in line and ("tokens/s" in line) == (columns >= 60)


def test_python_shows_the_progress_of_an_extraction(tiny_text, tmp_path, capsys):
    config = {"text": (str(tiny_text),), "seq_len": 16, "max_sequences": 2}
    headwater.extract(headwater.RunConfig(out=tmp_path / "seen", **config))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading text") and " 1/1 block " in lines[-1]
    headwater.extract(headwater.RunConfig(out=tmp_path / "silent", **config), progress=False)
    seen = []
    headwater.extract(headwater.RunConfig(out=tmp_path / "observed", **config), seen.append)
    assert capsys.readouterr().err == "" and seen


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


@pytest.mark.parametrize("arguments", [("sites",), ("sites", "--json"), ("extract", "--help")])
def test_nobody_reads_what_is_printed(arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    with start(*arguments, stdout=theirs) as process:
        os.close(theirs)
        assert process.communicate()[1] == "" and process.returncode == 0


def test_light_commands_do_not_load_torch():
    calls = "m(['sites']); m(['info', '.'])"
    code = f"import sys; from headwater.cli.entry import main as m; {calls}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_progress_goes_on_when_nobody_can_see_it():
    stream = io.StringIO()
    stream.write = broken
    for reporter in (Reporter(stream), Reporter(None)):
        reporter(Progress("text", rows=3))
        reporter(Progress("blocks", 4, 1))
        assert reporter.computing
        reporter.close()


def broken(text):
    raise BrokenPipeError


def test_plain_progress_is_rare_but_shows_beginning_and_end(monkeypatch):
    stream, entry = io.StringIO(), SimpleNamespace()
    reporter = Reporter(stream)
    for rows in range(50):
        reporter(Progress("text", rows=rows))
    progress = Progress("blocks", 100, 40)
    for done in range(40, 101):
        progress.done, progress.entry, progress.n_tokens = (
            done,
            entry if done > 40 else None,
            1000 * (done - 40),
        )
        reporter(progress)
    lines = stream.getvalue().splitlines()
    assert [line[:40] for line in lines[:2]] == [
        "reading text: 0 sequences",
        "100 blocks, 40 done already",
    ]
    assert len(lines) == 3 and " 100/100 blocks " in lines[2] and lines[2].endswith("0:00 left")
    counter = ByteReporter(stream, "checked")
    monkeypatch.setattr(counter, "_begun", time.perf_counter() - 5)
    counter(10**9)
    assert stream.getvalue().splitlines()[-1].startswith("checked 1 GB, 200 MB/s")
