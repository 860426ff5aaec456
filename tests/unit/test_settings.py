"""Settings: sources of values, errors for wrong values, and their descriptions."""

import dataclasses
import re
from typing import Any, Literal

import pytest

from nanochat_core.errors import UserError
from nanochat_core.settings import describe, load, setting
from tests.support.flag_reference import PROGRAMS


@dataclasses.dataclass(frozen=True)
class Example:
    """Serves examples.

    This paragraph is for readers of the code.
    """

    name: str = setting("nobody", "who to greet")
    port: int = setting(8000, "TCP port", minimum=0, maximum=65535)
    rate: float = setting(0.5, "greetings per second", minimum=0)
    loud: bool = setting(False, "shout; 100% of the time")
    colour: Literal["red", "green"] = setting("red", "what to paint")
    tags: tuple[str, ...] = setting(("a", "b"), "labels, comma separated")
    limit: int | None = setting(None, "most greetings", minimum=1)
    home: str = setting("~/x", "store", env="EXAMPLE_HOME")
    token: str = setting("", "key of the greeter", secret=True)


@dataclasses.dataclass(frozen=True)
class Strict:
    """Has settings that nobody can guess."""

    target: str = setting(help="where to go")
    low: int = setting(1, "lower end")
    high: int = setting(9, "upper end")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


@dataclasses.dataclass(frozen=True)
class Spoken:
    """Says a text, which is given without a flag."""

    prompt: str | None = setting(None, "what to say", positional=True)
    loud: bool = setting(False, "shout")
    voice: str = setting("", "who says it")


@dataclasses.dataclass(frozen=True)
class Compared:
    """Has members that need no flag."""

    models: tuple[str, ...] = setting(help="what to compare", positional=True)
    out: str = setting("", "where to write")


def loaded(*argv: str, cls: Any = Example, **environ: str) -> Any:
    return load(cls, prefix="NANOCHAT_EXAMPLE", program="example", argv=argv, environ=environ)


def test_without_flags_and_variables_there_are_the_defaults() -> None:
    assert loaded() == Example()


def test_a_flag_wins_over_the_variable_which_wins_over_the_default() -> None:
    assert loaded(NANOCHAT_EXAMPLE_PORT="1").port == 1
    assert loaded("--port", "2", NANOCHAT_EXAMPLE_PORT="1").port == 2
    assert loaded("--no-loud", NANOCHAT_EXAMPLE_LOUD="1").loud is False


def test_a_setting_may_take_the_place_of_other_settings_defaults() -> None:
    seen: list[Any] = []

    def inherit(given: Any) -> dict[str, Any]:
        seen.append(dict(given))
        return {"port": 7, "name": "heir", "limit": None}

    def inheriting(*argv: str, cls: Any = Example, **environ: str) -> Any:
        return load(cls, prefix="NANOCHAT_EXAMPLE", program="example", argv=argv, environ=environ, inherit=inherit)

    assert inheriting() == Example(port=7, name="heir")
    assert inheriting("--port", "1", NANOCHAT_EXAMPLE_NAME="given") == Example(port=1, name="given")
    assert seen == [{}, {"port": 1, "name": "given"}]


def test_a_required_setting_may_be_inherited() -> None:
    made = load(
        Strict, prefix="NANOCHAT_EXAMPLE", program="example", argv=[], environ={}, inherit=lambda _: {"target": "there"}
    )
    assert made.target == "there"


def test_an_empty_variable_counts_as_none() -> None:
    assert loaded(NANOCHAT_EXAMPLE_PORT="", NANOCHAT_EXAMPLE_NAME="") == Example()


def test_an_empty_flag_is_an_empty_text() -> None:
    assert loaded("--name", "", NANOCHAT_EXAMPLE_NAME="x").name == ""


def test_a_setting_may_have_a_variable_of_its_own_name() -> None:
    assert loaded(EXAMPLE_HOME="/h").home == "/h"
    assert loaded(NANOCHAT_EXAMPLE_HOME="/h").home == "~/x"


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_EXAMPLE_PORT", "77")
    monkeypatch.setattr("sys.argv", ["example", "--name", "x"])
    settings = load(Example, prefix="NANOCHAT_EXAMPLE", program="example")
    assert (settings.port, settings.name) == (77, "x")


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("name", "with space, comma=and %s", "with space, comma=and %s"),
        ("port", "80", 80),
        ("port", " 80 ", 80),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("colour", "green", "green"),
        ("tags", "x", ("x",)),
        ("tags", " x, y ,,z,", ("x", "y", "z")),
        ("tags", ",", ()),
        ("limit", "3", 3),
        *(("loud", text, True) for text in ("1", "true", "TRUE", "Yes", "on", " on ")),
        *(("loud", text, False) for text in ("0", "false", "No", "OFF")),
    ],
)
def test_every_type_is_read_from_its_text(field: str, text: str, value: object) -> None:
    from_variable = getattr(loaded(**{f"NANOCHAT_EXAMPLE_{field.upper()}": text}), field)
    assert (from_variable, type(from_variable)) == (value, type(value))
    if field != "loud":
        assert getattr(loaded(f"--{field}", text), field) == value


def test_a_switch_is_turned_on_and_off_by_its_flag() -> None:
    assert loaded("--loud").loud is True
    assert loaded("--no-loud").loud is False


@pytest.mark.parametrize(
    ("argv", "prompt"),
    [
        ((), None),
        (("Once", "upon"), "Once upon"),
        (("--voice", "x", "Once upon"), "Once upon"),
        (("Once", "--loud", "upon"), "Once upon"),
        (("--voice=x", "--", "--loud", "-1"), "--loud -1"),
        (("- a list",), "- a list"),
        (("--prompt", "Once upon"), "Once upon"),
        (("",), ""),
    ],
)
def test_a_text_may_stand_anywhere_between_the_flags(argv: Any, prompt: str | None) -> None:
    assert loaded(*argv, cls=Spoken).prompt == prompt


def test_members_may_stand_without_their_flag() -> None:
    for argv in (("a", "b", "--out", "x"), ("--out", "x", "a", "b"), ("--models", "a,b", "--out", "x")):
        assert loaded(*argv, cls=Compared) == Compared(("a", "b"), "x")
    assert loaded("a", "b", cls=Compared, NANOCHAT_EXAMPLE_MODELS="c,d").models == ("a", "b")


def test_a_text_beside_its_own_flag_is_refused() -> None:
    with pytest.raises(UserError, match="'upon' and --prompt give the same setting; use only one of them"):
        loaded("--prompt", "Once", "upon", cls=Spoken)


@pytest.mark.parametrize(
    ("field", "text", "complaint"),
    [
        ("port", "eighty", "is 'eighty', which is not a whole number"),
        ("port", "80.5", "is '80.5', which is not a whole number"),
        ("port", "-1", "is -1; it must be at least 0"),
        ("port", "65536", "is 65536; it must be at most 65535"),
        ("rate", "fast", "is 'fast', which is not a number"),
        ("rate", "-0.1", "is -0.1; it must be at least 0"),
        ("rate", "nan", "is nan; it must be at least 0"),
        ("rate", "inf", "is inf; it must be a finite number"),
        ("rate", "1e999", "is inf; it must be a finite number"),
        ("colour", "blue", "is 'blue'; choose one of red, green"),
        ("limit", "none", "is 'none', which is not a whole number"),
        ("limit", "0", "is 0; it must be at least 1"),
        ("loud", "maybe", "is 'maybe'; use true or false"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_where_it_came_from(field: str, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as from_variable:
        loaded(**{f"NANOCHAT_EXAMPLE_{field.upper()}": text})
    assert str(from_variable.value) == f"NANOCHAT_EXAMPLE_{field.upper()} {complaint}"
    if field != "loud":
        with pytest.raises(UserError) as from_flag:
            loaded(f"--{field}={text}")
        assert str(from_flag.value) == f"--{field} {complaint}"


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("65535", 65535)])
def test_bounds_are_allowed_themselves(text: str, value: int) -> None:
    assert loaded("--port", text).port == value


def test_a_required_setting_says_how_to_give_it() -> None:
    with pytest.raises(UserError, match=r"^--target \(or NANOCHAT_EXAMPLE_TARGET\) is required: where to go$"):
        loaded(cls=Strict)
    assert loaded(cls=Strict, NANOCHAT_EXAMPLE_TARGET="x").target == "x"
    assert loaded("--target", "y", cls=Strict).target == "y"


def test_a_required_setting_is_not_empty() -> None:
    with pytest.raises(UserError, match=r"^--target is empty; it is required: where to go$"):
        loaded("--target=", cls=Strict)


def test_a_combination_that_the_class_refuses_is_the_user_s_error() -> None:
    with pytest.raises(UserError, match="low 5 is above high 4"):
        loaded("--target", "x", "--low", "5", "--high", "4", cls=Strict)


@pytest.mark.parametrize("argv", [["--prot", "1"], ["--por", "1"], ["stray"], ["--port"]])
def test_unknown_abbreviated_and_incomplete_flags_end_with_usage(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        loaded(*argv)
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("usage: example")
    assert argv[0] in complaint


def test_underscores_become_dashes_in_flags() -> None:
    @dataclasses.dataclass(frozen=True)
    class Long:
        drain_seconds: float = setting(1.0, "time")

    assert loaded("--drain-seconds", "2", cls=Long).drain_seconds == 2
    with pytest.raises(UserError, match=r"^--drain-seconds is 'x'"):
        loaded("--drain-seconds", "x", cls=Long)


def help_text(cls: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        loaded("--help", cls=cls)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_each_setting_s_variable_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {line.split()[0]: line for line in help_text(Example, capsys, monkeypatch).splitlines() if "--" in line}
    assert lines["--name"].endswith("who to greet [default nobody; NANOCHAT_EXAMPLE_NAME]")
    assert lines["--port"].endswith("TCP port [default 8000; NANOCHAT_EXAMPLE_PORT]")
    assert lines["--loud,"].endswith("shout; 100% of the time [default False; NANOCHAT_EXAMPLE_LOUD]")
    assert lines["--tags"].endswith("labels, comma separated [default a,b; NANOCHAT_EXAMPLE_TAGS]")
    assert lines["--limit"].endswith("most greetings [NANOCHAT_EXAMPLE_LIMIT]")
    assert lines["--home"].endswith("store [default ~/x; EXAMPLE_HOME]")
    assert lines["--token"].endswith("key of the greeter [NANOCHAT_EXAMPLE_TOKEN]")


def test_help_begins_with_the_class_s_first_paragraph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_text(Example, capsys, monkeypatch)
    assert "Serves examples." in shown
    assert "readers of the code" not in shown


def test_no_secret_is_ever_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithSecret:
        """Keeps a secret."""

        token: str = setting("built-in-secret", "key", secret=True)

    settings = loaded("--token", "given-secret", cls=WithSecret)
    assert settings.token == "given-secret"
    shown = f"{settings!r} {settings} {describe(settings)} {help_text(WithSecret, capsys, monkeypatch)}"
    assert "given-secret" not in shown
    assert "built-in-secret" not in shown


def test_a_description_has_every_setting_and_tells_whether_a_secret_is_given() -> None:
    described = describe(loaded("--token", "given-secret", "--port", "1"))
    assert list(described) == [field.name for field in dataclasses.fields(Example)]
    assert (described["port"], described["token"], described["tags"]) == (1, "***", ("a", "b"))
    assert describe(loaded())["token"] == ""


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded().port = 1


def test_a_type_that_cannot_be_read_is_the_programmer_s_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd:
        field: bytes = setting(b"", "no")

    with pytest.raises(TypeError, match="bytes"):
        loaded("--field", "x", cls=Odd)


def test_help_texts_of_all_programs_have_one_style() -> None:
    helps = [field.metadata["help"] for _, _, settings in PROGRAMS for field in dataclasses.fields(settings)]
    assert len(helps) > 300
    assert [text for text in helps if not text or text.endswith(".")] == []
    # A first word in upper case is an abbreviation or a name, such as CPU or GPT-2.
    assert [text for text in helps if re.match("[A-Z]([a-z]| )", text)] == []
