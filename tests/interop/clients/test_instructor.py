"""Instructor, in its modes for tools, JSON objects and JSON schemas."""

from __future__ import annotations

import instructor
import openai
import pydantic
import pytest

from .conftest import MODEL, tool_call


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def url(start):
    def answer(prompt: str) -> str:
        tool = "PartialPerson" if "PartialPerson" in prompt else "Person"
        return tool_call(tool, name="Ada", age=36) if "<tools>" in prompt else '{"name": "Ada", "age": 36}'

    return f"{start(answer).url}/v1"


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON"])
def test_answers_by_a_class(url, mode):
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=instructor.Mode[mode])
    request = {"model": MODEL, "messages": [{"role": "user", "content": "a person"}], "max_retries": 0}
    person = client.chat.completions.create(response_model=Person, **request)  # of a class of Instructor's own
    assert isinstance(person, Person) and (person.name, person.age) == ("Ada", 36)
    partial = list(client.chat.completions.create_partial(response_model=Person, **request))
    assert (partial[-1].name, partial[-1].age) == ("Ada", 36)
