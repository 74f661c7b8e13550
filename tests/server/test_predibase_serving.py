"""The calls of the `predibase` package that know no address but https://serving.<domain>, and its asynchronous client.

The server stands behind TLS, as it would in the open; the package and `openai` below it are as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import make_adapter
from tests.server.hosting import Hosted, hosted, own_cache
from tests.server.sdk import Sdk
from tests.server.tls_front import tls_front

from lorikeet.config import PlatformConfig
from lorikeet.model.sources import find_model
from lorikeet.registry.records import Actor

# What /etc/hosts would say, and whom to trust.
SETTING = """
import os, socket
os.environ["SSL_CERT_FILE"] = os.environ["REQUESTS_CA_BUNDLE"] = authority
resolve = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    host = host.decode() if isinstance(host, bytes) else host
    return resolve("127.0.0.1" if str(host).endswith(".lorikeet.test") else host, *rest, **more)
socket.getaddrinfo = getaddrinfo
"""
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """`lorikeet up` with the embedded base and an adapter `city/1`."""
    place = tmp_path_factory.mktemp("serving")
    platform = PlatformConfig(home=str(place / "home"))
    names = ("api.lorikeet.test", "serving.lorikeet.test")
    settings = {"platform": platform, "allowed_hosts": names}
    with (
        own_cache(place / "cache"),
        hosted(Path("lorikeet-nano"), serve_settings=settings, max_context=256) as server,
    ):
        adapter = make_adapter(find_model("lorikeet-nano"), place / "adapter")
        assert server.state.platform is not None
        server.state.platform.home.add_adapter(Actor(), "city", adapter)
        yield server


@pytest.fixture(scope="module")
def run(up: Hosted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Code in the package's process, with `pb` and `url` (the server without TLS); its `result`, or its error."""
    sdk = Sdk()
    names = ("api.lorikeet.test", "serving.lorikeet.test")
    with tls_front(up.url, tmp_path_factory.mktemp("tls"), *names) as (port, authority):
        assert sdk(up.url, SETTING, authority=str(authority)).error is None

        def run(code: str, refused: bool = False) -> Any:
            answer = sdk(f"https://api.lorikeet.test:{port}", code, url=up.url)
            assert (answer.error is not None) == refused, answer
            return answer.error if refused else answer.result

        yield run
        sdk.close()


def test_chat(up: Hosted, run: Run) -> None:
    messages = [{"role": "user", "content": "Where is Oslo?"}]
    asked = "pb.chat.completion.create(model='lorikeet-nano', max_tokens=8, temperature=0, messages=messages{})"
    for more, model in (("", "lorikeet-nano"), (", adapter_id='city/1'", "city/1")):
        body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
        expected = up.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        asking = f"messages = {messages}\nreply = {asked.format(more)}\n"
        assert run(asking + "result = reply.choices[0].message.content, reply.model") == [expected, model]
        pieces = f"messages = {messages}\nparts = {asked.format(more + ', stream=True')}\n"
        assert run(pieces + "result = ''.join(p.choices[0].delta.content or '' for p in parts)") == expected


def test_completion(up: Hosted, run: Run) -> None:
    expected = up.complete(model="city/1", prompt="Once", max_tokens=6, temperature=0)["choices"][0]["text"]
    asked = "pb.completion.create(model='lorikeet-nano', prompt='Once', max_tokens=6, temperature=0, adapter_id='{}')"
    assert run(f"result = {asked.format('city/1')}.choices[0].text") == expected
    base = up.complete(model="lorikeet-nano", prompt="Once", max_tokens=6, temperature=0)["choices"][0]["text"]
    assert run(f"result = {asked.format('')}.choices[0].text") == base
    assert "nobody" in run(asked.format("nobody/1"), refused=True)
    assert "qwen" in run("pb.completion.create(model='qwen', prompt='x')", refused=True)
    assert (
        run("result = pb.deployments.client('lorikeet-nano').generate('Once', max_new_tokens=6).generated_text") == base
    )


def test_what_needs_another_kind_of_model_is_refused_by_name(run: Run) -> None:
    said = run("pb.embeddings.create(model='lorikeet-nano', input='x')", refused=True)
    assert said.startswith("BadRequestError") and "embeddings are not supported" in said
    said = run(
        "import asyncio\nasyncio.run(pb.deployments.async_client('lorikeet-nano', url).embed('x'))", refused=True
    )
    assert "client.embed is not supported" in said
    said = run("pb.deployments.client('lorikeet-nano').classify('x', adapter_id='city/1')", refused=True)
    assert "not trained for classification" in said


def test_metrics(run: Run) -> None:
    text = run("result = pb.deployments.client('lorikeet-nano').metrics()")
    assert "# TYPE lorikeet_" in text
    assert "expected 'prometheus'" in run("pb.deployments.client('lorikeet-nano').metrics('json')", refused=True)


def test_the_asynchronous_client(up: Hosted, run: Run) -> None:
    expected = up.complete(model="city/1", prompt="Once", max_tokens=6, temperature=0)["choices"][0]["text"]
    code = (
        "import asyncio\n"
        "async def main():\n"
        "    c = pb.deployments.async_client('lorikeet-nano', url)\n"
        "    whole = await c.generate('Once', adapter_id='city/1', max_new_tokens=6)\n"
        "    stream = c.generate_stream('Once', adapter_id='city/1', max_new_tokens=6)\n"
        "    return whole.generated_text, [p.token.text async for p in stream]\n"
        "result = asyncio.run(main())"
    )
    whole, pieces = run(code)
    assert whole == "".join(pieces) == expected


# --- what there is of the package ---------------------------------------------------------------------------------

SUPPORTED = {
    "adapters": ("archive", "cancel", "create", "delete", "download", "get", "get_config", "unarchive", "upload"),
    "chat.completion": ("create",),
    "completion": ("create",),
    "datasets": ("from_file", "from_pandas_dataframe", "get"),
    "deployments": ("async_client", "client", "get", "list", "openai_compatible_endpoint"),
    "finetuning.jobs": ("cancel", "create", "estimate_cost", "get", "watch"),
    "repos": ("create", "delete", "get", "list"),
}
LOCAL = [  # these ask no server
    "chat.completion.init_client", "completion.init_client", "deployments.build_serving_url",
    "deployments.convert_dict_to_deployment_config", "embeddings.init_client",
]  # fmt: skip
REFUSED = {
    "adapters.estimate_finetuning_cost":
        "(config={'base_model': 'x', 'task': 'sft', 'adapter': 'lora', 'epochs': 1, 'train_steps': 1}, dataset='x')",
    "adapters.update_config": "('trained/1', UpdateConfig())",
    "beta.batch_inference.cancel": "('x')",
    "beta.batch_inference.create": "(dataset='x', server_config=BatchInferenceServerConfig(base_model='x'))",
    "beta.batch_inference.download_results": "('x', dest='x')",
    "beta.batch_inference.get": "('x')",
    "beta.batch_inference.list": "()",
    "datasets.augment": None,  # asks OpenAI first
    "datasets.download": "('x', dest='x')",
    "deployments.create": "('x', config={'base_model': 'y'})",
    "deployments.delete": "('lorikeet-nano')",
    "deployments.download_request_logs": "('lorikeet-nano')",
    "deployments.get_recommended_config": "('lorikeet-nano')",
    "deployments.update": "('lorikeet-nano')",
    "embeddings.create": None,  # above
    "finetuning.jobs.update": "('x', UpdateConfig())",
    "gateways.create": "(GatewayConfig(name='x', description='x', providers=[], model_list=[]))",
    "gateways.delete": "('x')",
    "gateways.get": "('x')",
    "gateways.list": "()",
    "gateways.update": "('x', UpdateGatewayConfig())",
    "secrets.create": "('x', 'y')",
    "secrets.delete": "('x')",
    "secrets.get": "('x')",
    "secrets.update": "('x', 'y')",
}  # fmt: skip
WALK = """
result = []
def walk(thing, prefix):
    for name in dir(thing):
        if name.startswith("_"):
            continue
        found = getattr(thing, name)
        if type(found).__module__.startswith("predibase.") and "pql" not in type(found).__module__:
            if type(found) is not type(pb):
                walk(found, f"{prefix}{name}.")
        elif prefix and callable(found):
            result.append(prefix + name)
walk(pb, "")
"""


def test_every_call_of_the_package_was_looked_at(run: Run) -> None:
    """One that a later version adds shows here."""
    supported = [f"{family}.{call}" for family, calls in SUPPORTED.items() for call in calls]
    assert sorted(run(WALK)) == sorted([*supported, *LOCAL, *REFUSED])


@pytest.mark.parametrize("call", [call for call, arguments in REFUSED.items() if arguments is not None])
def test_what_is_not_supported_says_so(run: Run, call: str) -> None:
    imports = "from predibase import *\nfrom predibase.config import *\nfrom predibase.beta.config import *\n"
    config = "class UpdateConfig:\n    def model_dump(self, **_): return {}\n"
    said = run(f"{imports}{config}pb.{call}{REFUSED[call]}", refused=True)
    if call == "adapters.update_config":
        assert "no repository 'trained'" in said  # it asks for the adapter first
    else:
        assert "not supported" in said and "(" in said, said  # and what to do instead
