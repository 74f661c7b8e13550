import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.errors import ConfigError, DataError
from lorikeet.template import Template


def test_columns_filters_and_literal_braces() -> None:
    template = Template('{{"a": {slots | json}}} {text}!')
    assert template.columns == ["slots", "text"]
    assert template.render({"slots": {"x": "é"}, "text": "hi"}) == '{"a": {"x": "é"}} hi!'


@given(st.text(), st.dictionaries(st.text(), st.integers()))
def test_values_are_never_interpreted(text: str, slots: dict[str, int]) -> None:
    rendered = Template("{text}|{slots | json}").render({"text": text, "slots": slots})
    assert rendered.startswith(text + "|")
    assert json.loads(rendered[len(text) + 1 :]) == slots


@given(st.text())
def test_escaped_text_renders_as_itself(text: str) -> None:
    assert Template(text.replace("{", "{{").replace("}", "}}")).render({}) == text


@pytest.mark.parametrize("text", ["{", "}", "{}", "{a b}", "{a | yaml}", "{a"])
def test_malformed_templates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Template(text)


def test_errors_name_the_column() -> None:
    with pytest.raises(DataError, match="'label' is not in the row; it has 'text'"):
        Template("{label}").render({"text": "x"})
    with pytest.raises(DataError, match=r"'tags' holds list.*\{tags \| json\}"):
        Template("{tags}").render({"tags": []})
