"""OpenAI's package for JavaScript, installed by npm into a temporary folder."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from .conftest import MODEL, tool_call

PACKAGES = ("openai@^6", "zod@^4")
SCRIPT = """
import OpenAI from 'openai';
const [base, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base, apiKey: 'none', maxRetries: 0 });
const messages = [{ role: 'user', content: 'hi' }];
const weather = { type: 'function', function: { name: 'weather', parameters: {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'] } } };
const found = {};
found.models = (await client.models.list()).data.map((m) => m.id);
found.chat = (await client.chat.completions.create({ model, messages })).choices[0].message.content;
found.stream = '';
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  found.stream += chunk.choices[0]?.delta?.content ?? '';
}
for (const [name, tool_choice] of [['required', 'required'], ['named', { type: 'function', function: { name: 'weather' } }]]) {
  const helper = client.chat.completions.stream({ model, messages, tools: [weather], tool_choice });
  const message = (await helper.finalChatCompletion()).choices[0].message;
  found[name] = [message.content, message.tool_calls.map((c) => [c.function.name, c.function.arguments])];
}
let asked = 0;
const runner = client.chat.completions.runTools({ model, messages, tools: [{ type: 'function', function: {
  ...weather.function, function: async () => { asked += 1; return 'sunny'; }, parse: JSON.parse } }] });
found.runner = [await runner.finalContent(), asked];
found.response = (await client.responses.create({ model, input: 'hi' })).output_text;
found.events = [];
for await (const event of await client.responses.create({ model, input: 'hi', stream: true })) found.events.push(event.type);
found.embedding = (await client.embeddings.create({ model, input: ['a', 'b'] })).data.length;
try { await client.chat.completions.create({ model: 'none', messages }); } catch (e) { found.error = [e.status, e.param]; }
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    made = tmp_path_factory.mktemp("js")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *PACKAGES]
    subprocess.run(command, cwd=made, check=True, timeout=300)
    (made / "script.mjs").write_text(SCRIPT)
    return made


def test_all_calls(start, folder):
    def answer(prompt: str) -> str:
        return tool_call("weather", city="Rom") if "<tools>" in prompt and "<|tool|>" not in prompt else "Hello 😀!"

    command = ["node", "script.mjs", f"{start(answer).url}/v1", MODEL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == [MODEL]
    assert found["chat"] == found["stream"] == found["response"] == "Hello 😀!"
    for name in ("required", "named"):
        content, calls = found[name]
        assert not content and [(tool, json.loads(arguments)) for tool, arguments in calls] == [("weather", {"city": "Rom"})]
    assert found["runner"] == ["Hello 😀!", 1]
    assert found["events"][0] == "response.created" and found["events"][-1] == "response.completed"
    assert found["embedding"] == 2
    assert found["error"] == [404, "model"]
