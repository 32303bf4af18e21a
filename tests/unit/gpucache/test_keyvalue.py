# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""KEY=VALUE settings: what is written can be read back, and what shells and systemd read differently is refused."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core._keyvalue import Key, Schema, Settings, SettingsError

SCHEMA = Schema(
    "example",
    [
        Key("SIZE_MB", "integer", 500, "Size in MiB.", minimum=16, maximum=4096),
        Key("COUNT", "integer", "auto", "How many.", minimum=0, words=("auto",)),
        Key("RATIO", "number", 0.5, "A share."),
        Key("IDS", "list", [], "Names.", pattern="[a-z0-9]+"),
        Key("NOTE", "text", "", "Anything."),
        Key("ON", "boolean", True, "A switch."),
        Key("WHERE", "path", "/data", "A directory."),
        Key("LEVEL", "choice", "warn", "How loud.", choices=("warn", "error")),
    ],
    checks=[lambda s: ["COUNT and IDS contradict each other"] if s["COUNT"] == 0 and s["IDS"] else []],
)


def problems(text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        SCHEMA.parse(text, "f.conf")
    return caught.value.problems


def test_an_empty_file_gives_the_defaults() -> None:
    assert SCHEMA.parse("# nothing\n\n") == SCHEMA.defaults()


def test_values_are_typed() -> None:
    settings = SCHEMA.parse("SIZE_MB=256\nCOUNT=3\nRATIO=0.25\nIDS=a, b\nNOTE='x # y'\nON=no\n")
    assert settings.integer("SIZE_MB") == 256
    assert settings.integer("COUNT") == 3
    assert settings.number("RATIO") == 0.25
    assert settings.words("IDS") == ["a", "b"]
    assert settings.text("NOTE") == "x # y"
    assert settings.flag("ON") is False


def test_a_word_in_place_of_a_number_is_not_a_number() -> None:
    settings = SCHEMA.parse("COUNT=auto")
    assert settings["COUNT"] == "auto"
    with pytest.raises(TypeError, match="COUNT"):
        settings.integer("COUNT")


def test_every_bad_line_is_reported_with_its_number() -> None:
    found = problems("SIZE_MB=1\n\nSIZEMB=3\nexport NOTE=1\nON=maybe\nWHERE=data\nLEVEL=loud\nCOUNT=few\n")
    assert [problem.split(": ")[0] for problem in found] == [f"f.conf:{n}" for n in (1, 3, 4, 5, 6, 7, 8)]
    assert "the least is 16" in found[0]
    assert "did you mean SIZE_MB" in found[1]
    assert "a whole number or auto" in found[6]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("NOTE=a # b", "line of its own"),
        ("NOTE='a", "not closed"),
        ("NOTE='a' b", "nothing may follow"),
        ('NOTE="$HOME"', "single quotes"),
        ("NOTE=$HOME", "quote the whole value"),
        ("NOTE = a", "no blanks around"),
        ("NOTE=a\nNOTE=b", "already set in line 1"),
        ("COUNT=0\nIDS=a", "contradict"),
        ("IDS=A", "does not match"),
        ("RATIO=nan", "finite"),
    ],
)
def test_what_could_be_misread_is_refused(line: str, reason: str) -> None:
    assert reason in problems(line)[0]


def test_typed_values_are_held_to_the_same_limits() -> None:
    with pytest.raises(SettingsError, match="the most is 4096"):
        SCHEMA.coerce({"SIZE_MB": 5000})
    with pytest.raises(SettingsError, match="no setting"):
        SCHEMA.coerce({"NOPE": 1})
    with pytest.raises(SettingsError, match="whole number"):
        SCHEMA.coerce({"SIZE_MB": True})
    assert SCHEMA.coerce({"SIZE_MB": "256", "ON": "off"}) == SCHEMA.parse("SIZE_MB=256\nON=off")


def test_a_text_that_no_quoting_can_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="mixes quotes"):
        SCHEMA.render(SCHEMA.coerce({"NOTE": 'it\'s "this"'}))


def test_a_schema_with_a_bad_default_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="the least is 1"):
        Key("A", "integer", 0, "x", minimum=1)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=30).filter(
    lambda text: not ("'" in text and set(text) & set('"\\$`'))
)


@given(
    st.builds(
        dict,
        SIZE_MB=st.integers(16, 4096),
        COUNT=st.one_of(st.just("auto"), st.integers(1, 99)),
        RATIO=st.floats(allow_nan=False, allow_infinity=False),
        IDS=st.lists(st.from_regex("[a-z0-9]+", fullmatch=True), max_size=4),
        NOTE=texts,
        ON=st.booleans(),
    )
)
def test_what_is_rendered_reads_back_the_same(values: dict[str, object]) -> None:
    settings = SCHEMA.coerce(values)
    assert SCHEMA.parse(SCHEMA.render(settings, ["a header"])) == settings


def test_a_shell_reads_the_same_value(tmp_path: Path) -> None:
    note = "it's 50 % & more; # no *"
    path = tmp_path / "f.conf"
    path.write_text(SCHEMA.render(SCHEMA.coerce({"NOTE": note})), encoding="utf-8")
    shell = subprocess.run(
        ["sh", "-c", f'. {shlex.quote(str(path))}; printf %s "$NOTE"'], check=True, capture_output=True, text=True
    )
    assert shell.stdout == note


def test_settings_behave_like_a_mapping() -> None:
    settings = SCHEMA.defaults()
    assert len(settings) == len(SCHEMA.keys)
    assert list(settings) == list(SCHEMA.keys)
    assert isinstance(settings, Settings)
