from pathlib import Path
from typing import Any, Literal

import pytest

from genkl_ext.cli import UsageError
from genkl_ext.cli.parser import build, parse


def cook(
    inputs: list[Path],
    *,
    out: Path,
    method: Literal["boil", "fry"] | None = None,
    max_heat: float | None = None,
    portions: int = 2,
    very_hot: bool = False,
) -> None:
    """Cook a meal.

    From raw inputs.

    Args:
        inputs: what goes
            in
        out: the plate
        method: how
        max_heat: 100 % at most
        portions: how many
        very_hot: with chilli

    Example:
        genkl cook a.txt -o plate.txt
    """


DEFAULTS: dict[str, Any] = {
    "inputs": [Path("a")],
    "out": Path("p"),
    "method": None,
    "max_heat": None,
    "portions": 2,
    "very_hot": False,
}


def arguments(text: str) -> dict[str, Any] | None:
    return parse(cook, "genkl cook", text.split())


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("a -o p", {}),
        ("a --out p", {}),
        ("a b -o p", {"inputs": [Path("a"), Path("b")]}),
        ("-o p a", {}),
        ("a -o p --method fry", {"method": "fry"}),
        ("a -o p --max-heat 1e-3", {"max_heat": 0.001}),
        ("a -o p --max-heat -2", {"max_heat": -2.0}),
        ("a -o p --max-heat=3", {"max_heat": 3.0}),
        ("a -o p --portions 3 --very-hot", {"portions": 3, "very_hot": True}),
        ("123 null true -o p", {"inputs": [Path("123"), Path("null"), Path("true")]}),
    ],
)
def test_values(text: str, changes: dict[str, Any]) -> None:
    values = arguments(text)
    assert values == DEFAULTS | changes
    assert list(values) == list(DEFAULTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "the following arguments are required: out"),
        ("-o p", "the following arguments are required: inputs"),
        ("a -o", "argument -o/--out: expected one argument"),
        ("a -o p --portions x", "--portions: Expected a int. Got value: x"),
        ("a -o p --portions 1.5", "--portions: Expected a int. Got value: 1.5"),
        ("a -o p --max-heat hot", "--max-heat: Expected a float. Got value: hot"),
        ("a -o p --method bake", "argument --method: invalid choice: 'bake' (choose from"),
        ("a -o p --port 3", "unrecognized arguments: --port 3"),
        ("a -o p --config none.yaml", "--config: File does not exist"),
    ],
)
def test_wrong_usage(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments(text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_config(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("inputs: [a]\nout: q\nmax_heat: null\nportions: 5\nvery_hot: true\n")
    values = {"out": Path("q"), "portions": 5, "very_hot": True}
    assert arguments(f"--config {config}") == DEFAULTS | values
    values |= {"inputs": [Path("b")], "portions": 6}
    assert arguments(f"--config {config} b --portions 6") == DEFAULTS | values

    config.write_text("portion: 5\n")
    with pytest.raises(UsageError, match="'portion' is not accepted"):
        arguments(f"a -o p --config {config}")


def test_print_config_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments("a b -o p --method boil --print-config") is None
    config = tmp_path / "c.yaml"
    config.write_text(capsys.readouterr().out)
    assert arguments(f"--config {config}") == arguments("a b -o p --method boil")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments("--help") is None
    text = capsys.readouterr().out
    for part in (
        "usage: genkl cook ",
        "\nCook a meal.\n\nFrom raw inputs.\n",
        "what goes in\n",
        "-o FILE, --out FILE",
        "--method boil|fry",
        "100 % at most",
        "how many (default: 2)",
        "example:\n  genkl cook a.txt -o plate.txt\n",
    ):
        assert part in text
    assert "None" not in text


def test_arguments_with_a_default_are_options() -> None:
    def command(names: list[str] = [], json: bool = False) -> None:  # noqa: B006
        """A command."""

    assert parse(command, "genkl command", []) == {"names": [], "json": False}
    assert parse(command, "genkl command", ["a", "b", "--json"]) == {
        "names": ["a", "b"],
        "json": True,
    }


def test_options_with_several_values() -> None:
    def command(*, sizes: list[int] = [], kinds: list[Literal["a", "b"]] = []) -> None:  # noqa: B006
        """A command."""

    def values(text: str) -> dict[str, Any] | None:
        return parse(command, "genkl command", text.split())

    assert values("") == {"sizes": [], "kinds": []}
    assert values("--sizes 1 --kinds b a") == {"sizes": [1], "kinds": ["b", "a"]}
    with pytest.raises(UsageError, match="--sizes: Expected a int. Got value: x"):
        values("--sizes 1 x")
    with pytest.raises(UsageError, match="argument --kinds: invalid choice: 'c'"):
        values("--kinds a c")
    with pytest.raises(UsageError, match="--sizes: expected at least one argument"):
        values("--sizes")


def test_a_flag_is_false_by_default() -> None:
    def command(*, check: bool = True) -> None:
        """A command."""

    with pytest.raises(TypeError, match="check: a flag must be False by default, got True"):
        build(command, "genkl command")
