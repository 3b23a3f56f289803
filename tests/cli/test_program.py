"""The program as a process of its own: quick help, Ctrl-C, pipes, and the way in."""

import io
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import trimode
from trimode.cli.app import command, run
from trimode.cli.pages import pages

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_model.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
SLOWEST_HELP_CPU_S = 0.8
"""The promise is half a second on a quiet machine. Processor time, which a busy machine stretches far less than the clock's."""


def spawn(*arguments, pause_s=0.0, **settings):
    return subprocess.Popen(
        [sys.executable, str(FAKE), str(pause_s), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what it runs in the background with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **settings,
    )


@pytest.mark.parametrize("name", ["", "generate", "chat", "serve", "info", "demo"])
def test_help_is_quick_and_imports_nothing_heavy(name):
    code = (
        "import sys; from trimode.cli.app import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else status)"
    )
    taken = []
    for _ in range(3):
        start = os.times()
        words = [name] if name else []
        ended = subprocess.run(
            [sys.executable, "-c", code, *words, "--help"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        end = os.times()
        taken.append(end.children_user + end.children_system - start.children_user - start.children_system)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith(f"Usage: trimode {name}".rstrip())
    assert statistics.median(taken) < SLOWEST_HELP_CPU_S


def test_python_m_trimode_is_the_same_program():
    ended = subprocess.run(
        [sys.executable, "-m", "trimode", "genrate"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "trimode: No such command: genrate. Did you mean 'generate'? There are generate, chat,"
    )
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["generate", "Why?"], ["demo"]])
def test_ctrl_c_keeps_what_was_printed_and_exits_with_130(arguments):
    with spawn(*arguments, pause_s=0.4) as process:
        printed = process.stdout.read(7)
        while "The sky" not in printed:
            printed += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (printed + rest).endswith("\n")
    assert "That is all." not in rest
    assert "Traceback" not in errors


def test_ctrl_c_in_a_chat_stops_the_answer_and_the_chat_goes_on():
    with spawn("chat", "--no-stats", pause_s=0.3, stdin=subprocess.PIPE) as process:
        process.stdin.write("one\n")
        process.stdin.flush()
        printed = process.stdout.read(len("The sky"))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate("/mode\n", timeout=20)
    assert process.returncode == 0
    assert printed + rest in ("The sky\n", "The sky scatters blue\n")
    assert errors == "stopped\nmode auto\n"


@pytest.mark.parametrize("arguments", [["generate", "Why?"], ["demo"]])
def test_a_reader_that_goes_away_ends_the_program_quietly(arguments):
    with spawn(*arguments, pause_s=0.2) as process:
        process.stdout.read(3)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=20)
    assert (process.returncode, errors) == (141, "")


def test_a_closed_standard_output_is_no_crash():
    ended = subprocess.run(
        [f'"{sys.executable}" "{FAKE}" 0 generate hi --no-stats >&-'],
        shell=True,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_terminal_without_unicode_gets_question_marks():
    ended = subprocess.run(
        [sys.executable, str(FAKE), "0", "generate", "hi"],
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert ended.stderr.startswith("ar ? 10 tokens")


@pytest.mark.parametrize(
    "arguments",
    [["generate", "hi", "--model"], ["chat", "--model"], ["demo", "--model"], ["info"], ["info", "--json"]],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_a_path_that_holds_no_checkpoint_is_one_line(capfd, tmp_path, monkeypatch, arguments, kind):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a checkpoint")
    assert run([*arguments, str(path)]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("trimode: ")
    assert printed.err.count("\n") == 1
    assert str(path) in printed.err


def test_info_imports_no_torch(tmp_path):
    code = (
        "import sys; from trimode.cli.app import run; run(['info', sys.argv[1]]);"
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (0, 1)


def test_no_arguments_show_the_help_page(capsys):
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"trimode {trimode.__version__}\n"


def test_an_unknown_option_of_the_program_is_one_line(capsys):
    assert run(["--verison"]) == 2
    assert capsys.readouterr().err == (
        "trimode: No such option: --verison. Did you mean '--version'? See 'trimode --help'.\n"
    )


def test_the_help_pages_in_the_docs_are_current():
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == pages(), "run `make docs`"


def test_every_option_is_explained():
    for name, one in command().commands.items():
        for parameter in one.params:
            assert parameter.help, f"{name} {parameter.name}"
