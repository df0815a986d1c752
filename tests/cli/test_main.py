import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import genkl_ext as gk
from genkl_ext.cli import UsageError
from genkl_ext.cli import main as main_module
from genkl_ext.cli.main import COMMANDS, main

ALL = ", ".join(COMMANDS)
OF_DATA = "data info, data make-example"


def genkl(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genkl_ext.cli.main", *words],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_the_commands(word: str) -> None:
    done = genkl(word)
    assert done.returncode == 0 and done.stderr == ""
    for name, text in COMMANDS.items():
        assert f"  {name} " in done.stdout and text in done.stdout
    assert done.stdout.startswith("usage: genkl COMMAND ")
    assert "\nexample:\n  genkl score " in done.stdout


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_a_group_lists_its_commands(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", word]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: genkl data COMMAND ") and err == ""
    for name, text in COMMANDS.items():
        assert (f"  {name} " in out and text in out) == name.startswith("data ")
    assert "\nexample:\n  genkl data info " in out


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from genkl_ext.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'numpy', 'torch', 'nvidia', 'jsonargparse', 'pyarrow', 'rich', 'lightning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_version() -> None:
    done = genkl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"genkl {gk.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"genkl: a command is needed: {ALL} (see genkl --help)\n"),
        (["scoer"], "genkl: no command 'scoer'; did you mean score? (see genkl --help)\n"),
        (["--x"], f"genkl: no command '--x'; there are {ALL} (see genkl --help)\n"),
        (["data"], f"genkl data: a command is needed: {OF_DATA} (see genkl data --help)\n"),
        (
            ["data", "make-exmple"],
            "genkl data: no command 'data make-exmple'; did you mean data make-example? "
            "(see genkl data --help)\n",
        ),
        (
            ["data", "--x"],
            f"genkl data: no command 'data --x'; there are {OF_DATA} (see genkl data --help)\n",
        ),
    ],
)
def test_wrong_command(words: list[str], line: str) -> None:
    done = genkl(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: genkl {command} ") and err == ""
    _, _, example = out.lower().partition("example:")
    assert f"genkl {command}" in example
    assert "--debug" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_rejects_unknown_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--no-such-option"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"genkl {command}: ") and err.endswith(f"(see genkl {command} --help)\n")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Makes ``genkl info`` do something else."""

    def replace(action) -> None:
        def info() -> None:
            """Something else."""
            action()

        monkeypatch.setattr("genkl_ext.cli.info.info", info)

    return replace


def raiser(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("score: a.npy\nis  bad"), 1, "genkl info: a.npy is bad\n"),
        (ValueError("info: it is bad"), 1, "genkl info: it is bad\n"),
        (FileNotFoundError("no a.npy"), 1, "genkl info: no a.npy\n"),
        (KeyError("k"), 1, "genkl info: KeyError: 'k' (--debug shows the traceback)\n"),
        (ValueError(), 1, "genkl info: ValueError (--debug shows the traceback)\n"),
        (MemoryError(), 1, "genkl info: MemoryError (--debug shows the traceback)\n"),
        (UsageError("--a needs --b"), 2, "genkl info: --a needs --b (see genkl info --help)\n"),
        (KeyboardInterrupt(), 130, "genkl info: interrupted\n"),
    ],
)
def test_an_error_is_one_line(
    command, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    command(raiser(error))
    assert main(["info"]) == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("words", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(command, words: list[str]) -> None:
    command(raiser(ValueError("it is bad")))
    with pytest.raises(ValueError, match="it is bad"):
        main(words)


def test_debug_exits_1_with_a_traceback(tmp_path: Path) -> None:
    done = genkl(
        "score", str(tmp_path / "none.npy"), "--preset", "webvision", "-o", "t.npy", "--debug"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")


def test_a_warning_is_one_line(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda: warnings.warn("two\nlines", stacklevel=2))
    assert main(["info"]) == 0
    assert capsys.readouterr() == ("", "genkl info: warning: two lines\n")


def test_the_status_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def info() -> int:
        """Something else."""
        return 3

    monkeypatch.setattr("genkl_ext.cli.info.info", info)
    assert main(["info"]) == 3


@pytest.mark.parametrize("words", [["--help"], ["info", "--json"], ["score", "--help"]])
def test_a_closed_pipe_is_quiet(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    # As in a shell: output waits in a buffer until the end.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "genkl_ext.cli.main", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            env=environment,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminated_command_cleans_up(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from genkl_ext.cli import info as module\n"
        "from genkl_ext.cli.main import main\n"
        "from genkl_ext.files import atomic_write\n"
        "def info() -> None:\n"
        "    with atomic_write(sys.argv[1]):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "module.info = info\n"
        "sys.exit(main(['info']))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.csv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        assert len(os.listdir(tmp_path)) == 1
        process.terminate()
    assert process.returncode == 143
    assert os.listdir(tmp_path) == []


def test_the_list_of_commands_is_the_folder() -> None:
    folder = Path(main_module.__file__).parent
    parts = {"__init__", "main", "parser", "progress"}
    files = {path.stem for path in folder.glob("*.py")} - parts
    assert {name.replace("_", "-") for name in files} == {name.split()[0] for name in COMMANDS}
