"""The published `predibase` package against a whole server: every supported call, what is refused, and retries."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.fixtures import make_adapter
from tests.server.flaky_proxy import flaky_proxy
from tests.server.hosting import Hosted, hosted, own_cache
from tests.server.sdk import Sdk

from lorikeet.config import PlatformConfig
from lorikeet.model.sources import find_model
from lorikeet.registry.records import Actor
from lorikeet.server.platform import Platform
from lorikeet.server.predibase.config import FinetuningConfig

CITIES = ("Oslo", "Lima", "Rome", "Cairo", "Paris", "Quito")


@pytest.fixture(scope="module")
def sdk() -> Iterator[Sdk]:
    one = Sdk()
    yield one
    one.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """`lorikeet up` with the embedded base."""
    settings = {"platform": PlatformConfig(home=str(tmp_path_factory.mktemp("home")), job_threads=1)}
    with (
        own_cache(tmp_path_factory.mktemp("cache")),
        hosted(Path("lorikeet-nano"), serve_settings=settings, max_context=256) as server,
    ):
        yield server


@pytest.fixture
def run(up: Hosted, sdk: Sdk) -> Callable[..., Any]:
    def run(code: str, **names: Any) -> Any:
        answer = sdk(up.url, code, url=up.url, **names)
        assert answer.error is None, answer
        return answer.result

    return run


@pytest.fixture
def refused(up: Hosted, sdk: Sdk) -> Callable[..., str]:
    def refused(code: str, **names: Any) -> str:
        answer = sdk(up.url, code, url=up.url, **names)
        assert answer.error is not None, answer
        return answer.error

    return refused


def platform_of(up: Hosted) -> Platform:
    assert up.state.platform is not None
    return up.state.platform


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "cities.csv"
    lines = [f"Where does row {i} live? Answer:, {CITIES[i % 6]}" for i in range(24)]
    path.write_text("prompt,completion\n" + "\n".join(lines) + "\n")
    return path


# --- accounts, deployments, generation ----------------------------------------------------------------------------


def test_deployments(run: Callable[..., Any], refused: Callable[..., str]) -> None:
    one = run("d = pb.deployments.get('lorikeet-nano'); result = d.model_dump()")
    assert (one["name"], one["status"], one["context_window"], one["model"]) == (
        "lorikeet-nano", "ready", 255, "lorikeet-nano",
    )  # fmt: skip
    assert run("result = [d.name for d in pb.deployments.list()]") == ["lorikeet-nano"]
    assert run("result = pb.deployments.list(type='shared')") == []
    assert "lorikeet-nano" in refused("pb.deployments.get('qwen3-8b')")
    for call in ("create('x', config={'base_model': 'y'})", "delete('lorikeet-nano')", "update('lorikeet-nano')",
                 "get_recommended_config('lorikeet-nano')"):  # fmt: skip
        assert "not supported" in refused(f"pb.deployments.{call}")
    assert "not supported" in refused("pb.secrets.get('x')")


def test_generate_and_stream(up: Hosted, run: Callable[..., Any], refused: Callable[..., str]) -> None:
    client = "c = pb.deployments.client('lorikeet-nano', serving_url_override=url)\n"
    text, tokens = run(
        client + "r = c.generate('Once upon a time', max_new_tokens=12)\n"
        "result = r.generated_text, r.details.generated_tokens"
    )
    other = up.complete(model="lorikeet-nano", prompt="Once upon a time", max_tokens=12, temperature=0)
    assert (text, tokens) == (other["choices"][0]["text"], other["usage"]["completion_tokens"])
    pieces = run(
        client + "parts = list(c.generate_stream('Once upon a time', max_new_tokens=12))\n"
        "result = [p.token.text for p in parts], parts[-1].generated_text"
    )
    assert "".join(pieces[0]) == pieces[1] == text
    assert "nobody" in refused(client + "c.generate('x', adapter_id='nobody/1')")
    assert "tenant" in refused(
        "pb._session.tenant, kept = 'somebody', pb._session.tenant\n"
        "try: pb.deployments.client('lorikeet-nano', serving_url_override=url).generate('x')\n"
        "finally: pb._session.tenant = kept"
    )


def test_the_openai_routes_of_a_deployment(up: Hosted, run: Callable[..., Any]) -> None:
    base = run("result = pb.deployments.openai_compatible_endpoint('lorikeet-nano', serving_url=url)")
    body = {"model": "lorikeet-nano", "prompt": "Once", "max_tokens": 4, "temperature": 0}
    assert httpx.post(f"{base}/completions", json=body).json()["choices"][0]["text"]
    wrong = httpx.post(f"{base}/completions", json=body | {"colour": 1}).json()
    assert "colour" in wrong["error"]["message"]


# --- repositories -------------------------------------------------------------------------------------------------


def test_repos(run: Callable[..., Any], refused: Callable[..., str]) -> None:
    made = run("result = pb.repos.create(name='first', description='words').model_dump()")
    assert (made["name"], made["description"], made["all_versions"]) == ("first", "words", [])
    assert run("result = pb.repos.get('first').uuid") == made["uuid"]
    assert "first" in run("result = [r.name for r in pb.repos.list(limit=100)]")
    assert run("result = pb.repos.create(name='first', exists_ok=True).uuid") == made["uuid"]
    assert "there already" in refused("pb.repos.create(name='first', description='others')")
    assert "expected a name" in refused("pb.repos.create(name='no spaces')")
    run("pb.repos.delete('first')")
    assert "no repository" in refused("pb.repos.get('first')")


# --- datasets -----------------------------------------------------------------------------------------------------


def test_datasets(up: Hosted, run: Callable[..., Any], refused: Callable[..., str], rows: Path, tmp_path: Path) -> None:
    made = run("result = pb.datasets.from_file(path, name='cities').model_dump()", path=str(rows))
    assert (made["name"], made["status"], made["connection_name"]) == ("cities", "connected", "file_uploads")
    assert run("result = pb.datasets.get('cities').uuid") == made["uuid"]
    assert run("result = pb.datasets.from_file(path, name='cities').uuid", path=str(rows)) == made["uuid"]
    (tmp_path / "other.csv").write_text("prompt,completion\na,b\n")
    assert "other content" in refused("pb.datasets.from_file(path, name='cities')", path=str(tmp_path / "other.csv"))
    frame = "import pandas as pd\nresult = pb.datasets.from_pandas_dataframe(pd.DataFrame(rows), name='frame').name"
    assert run(frame, rows=[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d,\n e"}]) == "frame"
    catalog = platform_of(up).catalog
    assert catalog.datasets.get(Actor(), "frame").rows == 2
    (tmp_path / "broken.csv").write_text("prompt,completion\na,b\nc\n")
    said = refused("pb.datasets.from_file(path)", path=str(tmp_path / "broken.csv"))
    assert "rows.csv:3: expected 2 cells" in said and "/rows.csv" not in said
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert ".jsonl" in refused("pb.datasets.from_file(path)", path=str(tmp_path / "rows.xlsx"))
    assert "not supported" in refused("pb.datasets.download('cities', dest='x')")


def test_splits_and_conversations(
    up: Hosted, run: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    def upload(name: str, listed: list[Any], ask: Callable[..., Any] = run) -> Any:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in listed))
        return ask("pb.datasets.from_file(path)", path=str(path))

    ask, say = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}
    upload("split", [{"prompt": "a", "completion": "b", "split": s} for s in ("train", "evaluation", "train")])
    upload("talk", [{"messages": [{"role": "system", "content": "Be brief."}, ask, say], "split": "train"}] * 2)
    catalog = platform_of(up).catalog
    split, talk = (catalog.datasets.get(Actor(), name) for name in ("split", "talk"))
    assert {name: one.rows for name, one in split.splits.items()} == {"train": 2, "validation": 1}
    assert split.columns == {"prompt": "text", "completion": "text"}
    assert set(talk.columns) == {"system", "user", "assistant"}
    assert "row 2: split: expected train" in upload(
        "s", [{"a": "1", "split": "train"}, {"a": "1", "split": 3}], refused
    )
    assert "row 1: messages" in upload("m", [{"messages": [ask, say, ask, say]}], refused)
    assert "messages" in upload("m", [{"messages": [{**ask, "weight": 1}, say]}], refused)


def test_presigned_addresses(up: Hosted) -> None:
    """Without a key, once, for the files that were announced, and no more than the server takes."""
    begun = up.post("/v2/datasets/upload", {"fileName": "x.csv", "mimeType": "text/csv"}).json()
    address = begun["presignedUrl"]
    assert httpx.put(address.replace("rows.csv", "rows.exe"), content=b"x").status_code == 404
    assert httpx.put(address[:-15] + "x/rows.csv", content=b"x").status_code == 404
    assert httpx.put(address, content=b"a,b\n1,2\n").status_code == 200
    assert httpx.put(address, content=b"a,b\n1,2\n").status_code == 200
    assert httpx.put(address, content=b"a,b\n1,3\n").status_code == 409
    done = up.http.put("/v2/datasets/upload", json={"name": "once", "uploadToken": begun["uploadToken"]})
    again = up.http.put("/v2/datasets/upload", json={"name": "once", "uploadToken": begun["uploadToken"]})
    assert done.json()["uuid"] == again.json()["uuid"]
    wrong = up.http.put("/v2/adapters/upload", json={"uploadToken": begun["uploadToken"]})
    assert wrong.status_code == 404 and "upload" in wrong.json()["error"]


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(find_model("lorikeet-nano"), tmp_path_factory.mktemp("peft") / "adapter")


def test_adapters(
    up: Hosted, run: Callable[..., Any], refused: Callable[..., str], peft_folder: Path, tmp_path: Path
) -> None:
    run("pb.repos.create(name='uploaded')")
    made = run("result = pb.adapters.upload(folder, 'uploaded').model_dump()", folder=str(peft_folder))
    assert (made["repo"], made["tag"], made["artifact_path"], made["archived"]) == ("uploaded", 1, "uploaded/1", False)
    assert run("result = pb.adapters.get('uploaded/1').name") == "uploaded/1"
    assert [one["tag"] for one in run("result = [v.model_dump() for v in pb.repos.get('uploaded').versions]")] == [1]
    client = "c = pb.deployments.client('lorikeet-nano', serving_url_override=url)\n"

    def logprobs(**chosen: str) -> Any:
        code = "result = [t.logprob for t in c.generate('Once', max_new_tokens=6, **chosen).details.tokens]"
        return run(client + code, chosen=chosen)

    by_number = logprobs(adapter_id="uploaded/1")
    assert by_number == logprobs(adapter_id="uploaded", adapter_source="pbase") != logprobs()
    run("pb.adapters.download('uploaded/1', dest=dest)", dest=str(tmp_path / "one.zip"))
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("adapter_model.safetensors") == (peft_folder / "adapter_model.safetensors").read_bytes()
    run("pb.adapters.archive('uploaded/1')")
    assert run("result = pb.adapters.get('uploaded/1').archived, len(pb.repos.get('uploaded').versions)") == [True, 0]
    run("pb.adapters.unarchive('uploaded/1')")
    assert run("result = pb.adapters.get('uploaded/1').archived") is False
    assert "no checkpoint" in refused("pb.adapters.get('uploaded/1@3')")
    assert "training run" in refused("pb.adapters.get_config('uploaded/1')")
    run("pb.adapters.delete('uploaded/1')")
    assert "deleted" in refused("pb.adapters.get('uploaded/1')")
    assert "no version" in refused("pb.adapters.download('uploaded/1', dest=dest)", dest=str(tmp_path / "two.zip"))


def test_adapters_that_cannot_be_served_are_refused_at_the_upload(
    refused: Callable[..., str], run: Callable[..., Any], peft_folder: Path, tmp_path: Path
) -> None:
    upload = "pb.adapters.upload(folder, 'refusals')"
    assert "no repository" in refused(upload, folder=str(peft_folder))
    run("pb.repos.create(name='refusals')")
    (tmp_path / "adapter_config.json").write_bytes((peft_folder / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "a pickle" in refused(upload, folder=str(tmp_path))
    (tmp_path / "adapter_model.bin").unlink()
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 999}))
    (tmp_path / "adapter_model.safetensors").write_bytes((peft_folder / "adapter_model.safetensors").read_bytes())
    assert "999" in refused(upload, folder=str(tmp_path))
    assert run("result = pb.repos.get('refusals').versions") == []


# --- fine-tuning --------------------------------------------------------------------------------------------------

SMALL = {"base_model": "lorikeet-nano", "epochs": 3, "learning_rate": 0.002, "rank": 4, "effective_batch_size": 8}


def test_the_script_of_the_documentation(up: Hosted, run: Callable[..., Any], rows: Path) -> None:
    """Repository, dataset, training watched to its end, generation: nothing but the address and a key."""
    name, status, printed = run(
        "pb.repos.create(name='my_adapter', description='cities')\n"
        "dataset = pb.datasets.from_file(path, name='my_cities')\n"
        "job = pb.finetuning.jobs.create(config=config, dataset=dataset, repo='my_adapter', description='one')\n"
        "done = pb.finetuning.jobs.watch(job)\n"
        "result = done.target_repo, done.status, done.uuid",
        path=str(rows), config=SMALL,
    )  # fmt: skip
    assert (name, status) == ("my_adapter", "completed"), printed
    text = run(
        "c = pb.deployments.client('lorikeet-nano', serving_url_override=url)\n"
        "result = c.generate(prompt, adapter_id='my_adapter/1', max_new_tokens=64).generated_text",
        prompt="Where does row 3 live? Answer:",
    )  # fmt: skip
    base = up.complete(model="lorikeet-nano", prompt="Where does row 3 live? Answer:", max_tokens=64, temperature=0)
    assert text != base["choices"][0]["text"]
    adapter = run("result = pb.adapters.get('my_adapter/1').model_dump()")
    assert (adapter["artifact_path"], adapter["finetuning_error"]) == ("my_adapter/1", None)
    assert run("result = pb.adapters.get_config('my_adapter/1').epochs") == 3
    middle = run("result = pb.adapters.get('my_adapter/1@3').model_dump()")
    assert (middle["checkpoint"], middle["artifact_path"]) == (3, "my_adapter/1@3")
    run("pb.deployments.client('lorikeet-nano', serving_url_override=url)"
        ".generate('x', adapter_id='my_adapter/1@3', max_new_tokens=2)")  # fmt: skip
    again = run(
        "from predibase import SFTConfig\n"
        "a = pb.adapters.create(config=SFTConfig(epochs=1), dataset='my_cities', repo='my_adapter',"
        " continue_from_version='my_adapter/1')\n"
        "result = a.name, a.artifact_path"
    )
    assert again == ["my_adapter/2", "my_adapter/2"]
    catalog = platform_of(up).catalog
    first, second = (catalog.versions.get(Actor(), "my_adapter", number) for number in (1, 2))
    assert second.parent_id == first.id and second.recipe is not None and second.recipe["rank"] == 4


LABELS = ["cold", "hot", "mild"]


@pytest.fixture(scope="module")
def trained(up: Hosted, sdk: Sdk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Jobs that were queued together and have ended: `weather` classifies, `watched` validates, `long` fails."""
    folder = tmp_path_factory.mktemp("data")
    weather = [{"text": f"it is {20 * (i % 3) + i} degrees", "label": LABELS[i % 3]} for i in range(18)]
    splits = ["train"] * 16 + ["evaluation"] * 4
    watched = [{"prompt": f"{i}:", "completion": " a", "split": split} for i, split in enumerate(splits)]
    files = {"weather": weather, "watched": watched, "long": [{"prompt": "x " * 5000, "completion": "y"}]}
    for name, listed in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in listed))
    configs = {
        "weather": SMALL | {"task": "classification"},
        "watched": SMALL | {"train_steps": 5, "enable_early_stopping": True, "lr_scheduler": {"type": "linear"}},
        "long": SMALL,
    }
    answer = sdk(
        up.url,
        "jobs = {}\n"
        "for name, config in configs.items():\n"
        "    pb.repos.create(name=name)\n"
        "    pb.datasets.from_file(f'{folder}/{name}.jsonl')\n"
        "    jobs[name] = pb.finetuning.jobs.create(config=config, dataset=name, repo=name).uuid\n"
        "result = {name: [job, pb.finetuning.jobs.watch(job).status] for name, job in jobs.items()}",
        folder=str(folder), configs=configs,
    )  # fmt: skip
    assert answer.error is None, answer
    assert {name: status for name, (_, status) in answer.result.items()} == {
        "weather": "completed", "watched": "completed", "long": "errored",
    }  # fmt: skip
    return {name: job for name, (job, _) in answer.result.items()}


def test_the_stream_of_metrics(up: Hosted, run: Callable[..., Any], trained: dict[str, str]) -> None:
    """What `watch` is told: rows at the ends of epochs, steps in between, and where the end is."""
    job = trained["watched"]
    messages = run(
        "import json\nresult = [json.loads(one) for one in pb.listen_websocket(address)]",
        address=f"/v2/finetuning/jobs/{job}/metrics/stream",
    )
    meta = messages[-1]["meta"]
    assert (meta["steps"], meta["total_steps"], meta["steps_per_epoch"], meta["is_completed"]) == (5, 5, 2, True)
    shown = [one["data"] for one in messages if one["data"]["checkpoint_number"]]
    assert [one["checkpoint_number"] for one in shown] == [2, 4, 5]
    assert all(one["train_metrics_loss"] > 0 and one["validation_metrics_loss"] > 0 for one in shown)
    assert not any(one["meta"]["is_completed"] for one in messages[:-1])
    timeline = up.http.get(f"/v2/finetuning/jobs/{job}/timeline").json()
    assert set(timeline) == {"queued", "training", "completed", "events"}
    listed = up.http.get("/v2/finetuning/jobs", params={"limit": 100}).json()["data"]["jobs"]
    assert job in [one["uuid"] for one in listed]


def test_jobs_that_are_stopped_or_fail(
    run: Callable[..., Any], refused: Callable[..., str], trained: dict[str, str], rows: Path
) -> None:
    status, job = run(
        "pb.repos.create(name='ends')\npb.datasets.from_file(path, name='ends')\n"
        "job = pb.finetuning.jobs.create(config=config, dataset='ends', repo='ends')\n"
        "pb.adapters.cancel('ends/1')\n"
        "result = pb.finetuning.jobs.watch(job).status, job.uuid",
        path=str(rows), config=SMALL | {"epochs": 500},
    )  # fmt: skip
    assert status in ("canceled", "stopping")
    until = "import time\nwhile pb.finetuning.jobs.get(job).status == 'stopping': time.sleep(0.2)\n"
    assert "canceled" in refused(until + "pb.adapters.get('ends/1')", job=job)
    said = refused("pb.adapters.get('long/1')")
    assert said.startswith("FinetuningError") and "tokens" in said


def test_configs_that_cannot_be_done_are_refused_by_name(refused: Callable[..., str], run: Callable[..., Any]) -> None:
    run(
        "import pandas as pd\npb.repos.create(name='refusing')\n"
        "pb.datasets.from_pandas_dataframe(pd.DataFrame([{'prompt': 'a', 'completion': 'b'}]), name='plain')"
    )
    create = "pb.finetuning.jobs.create(config=config, dataset='plain', repo='refusing')"
    for change, said in (
        ({"base_model": "qwen3-8b"}, "'base_model': expected 'lorikeet-nano'"),
        ({"task": "grpo"}, "'task'"),
        ({"adapter": "turbo_lora"}, "'adapter'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"enable_early_stopping": True}, "no rows whose column split is 'evaluation'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'target_modules.1'"),
        ({"task": "classification"}, "the columns text and label"),
    ):
        assert said in refused(create, config={"base_model": "lorikeet-nano", **change})
    fields = run("from predibase import SFTConfig\nresult = list(SFTConfig.model_fields)")
    assert set(fields) <= set(FinetuningConfig.model_fields), "a field of the package that was never looked at"
    spec = "pb.finetuning.jobs.create(config=config, dataset='plain', repo='refusing', compute_spec={'region': 'x'})"
    assert "computeSpec" in refused(spec, config=SMALL)
    assert "no dataset" in refused(create.replace("'plain'", "'absent'"), config=SMALL)
    assert "no repository" in refused(create.replace("'refusing'", "'absent'"), config=SMALL)
    assert run("result = pb.repos.get('refusing').versions") == []


def test_classification(
    up: Hosted, run: Callable[..., Any], refused: Callable[..., str], trained: dict[str, str]
) -> None:
    """Label probabilities are those of transformers and peft with the same weights."""
    client = "c = pb.deployments.client('lorikeet-nano', serving_url_override=url)\n"
    classify = client + "result = c.classify(texts, adapter_id='weather/1').model_dump()"
    texts = ["it is 3 degrees", "it is 50 degrees"]
    found = run(classify, texts=texts)
    assert [one["index"] for one in found["data"]] == [0, 1] and found["model"] == "weather/1"
    folder = platform_of(up).home.adapter_folder(Actor(), "weather/1")[1]
    for text, one in zip(texts, found["data"], strict=True):
        expected = label_probabilities(folder, f"{text}\nLabel:", [f" {label}" for label in LABELS])
        assert one["probs"] == pytest.approx(expected, abs=2e-3) and one["num_classes"] == 3
        assert one["label"] == LABELS[expected.index(max(expected))]
    assert run(classify, texts="one text")["data"][0]["num_classes"] == 3
    assert "not trained for classification" in refused(client + "c.classify('x')")
    assert "no repository" in refused(client + "c.classify('x', adapter_id='nobody/1')")


def label_probabilities(folder: Path, prompt: str, completions: list[str]) -> list[float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = find_model("lorikeet-nano")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    head = tokenizer(prompt).input_ids
    scores = []
    for completion in completions:
        tail = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        tokens = torch.tensor([[*head, *tail]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(-1)
        scores.append(sum(logprobs[len(head) + i - 1, token].item() for i, token in enumerate(tail)))
    return torch.tensor(scores).softmax(0).tolist()


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["503", "drop"])
def test_what_the_sdk_repeats_is_made_once(up: Hosted, sdk: Sdk, rows: Path, peft_folder: Path, how: str) -> None:
    """Everything that creates takes effect, and its answer is lost on the way."""
    name = f"repeated-{how}"
    catalog = platform_of(up).catalog
    with flaky_proxy(up.url) as proxy:
        for method, pattern in (
            ("POST", "/v2/repos"), ("POST", "/v2/datasets/upload"), ("PUT", "/v2/datasets/upload"),
            ("GET", "/v2/finetuning/jobs/cost-estimate"), ("POST", "/v2/finetuning/jobs"),
            ("POST", "/v2/finetuning/jobs/[^/]+/cancel"), ("POST", "/v2/adapters/upload"),
            ("PUT", "/v2/adapters/upload/"),
        ):  # fmt: skip
            proxy.fail(method, pattern, how)
        create = "pb.finetuning.jobs.create(config=config, dataset=name, repo=name, description='d').uuid"
        answer = sdk(
            proxy.url,
            "pb.repos.create(name=name, description='d')\npb.datasets.from_file(path, name=name)\n"
            f"first = {create}\npb.finetuning.jobs.cancel(first)\n"
            "adapter = pb.adapters.upload(folder, name)\nresult = first, adapter.tag",
            name=name, path=str(rows), folder=str(peft_folder), config=SMALL | {"epochs": 400},
        )  # fmt: skip
        assert answer.error is None and proxy.rules == [], answer
        assert proxy.seen.count(("POST", "/v2/finetuning/jobs")) == 2
        job, tag = answer.result
        assert [one.id for one in catalog.jobs.page(Actor(), repository=name).items] == [job] and tag == 2
        assert [one.number for one in catalog.repositories.get(Actor(), name).versions] == [1, 2]
        again = sdk(proxy.url, f"result = {create}", name=name, config=SMALL | {"epochs": 400})
        assert again.error is None and again.result != job, "who asks again wants another one"
        assert len(catalog.jobs.page(Actor(), repository=name).items) == 2
        catalog.jobs.cancel(Actor(), again.result)
        assert "there already" in str(sdk(proxy.url, "pb.repos.create(name=name, description='d')", name=name).error)


def test_a_repeat_beside_the_first(up: Hosted, run: Callable[..., Any], rows: Path) -> None:
    """The SDK gave up waiting and asks again while the server is still at work."""
    run("pb.repos.create(name='beside')\npb.datasets.from_file(path, name='beside')", path=str(rows))
    body = {"params": SMALL | {"epochs": 400}, "dataset": "beside", "repo": "beside", "description": None}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: httpx.post(f"{up.url}/v2/finetuning/jobs", json=body), range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    (job,) = {reply.json()["uuid"] for reply in replies}
    up.post(f"/v2/finetuning/jobs/{job}/cancel", {})
    assert len(platform_of(up).catalog.jobs.page(Actor(), repository="beside").items) == 1


# --- keys ---------------------------------------------------------------------------------------------------------


def test_tenants_and_roles(sdk: Sdk, rows: Path, tmp_path: Path) -> None:
    settings = {"platform": PlatformConfig(home=str(tmp_path / "home"), max_upload=2000)}
    with own_cache(tmp_path / "cache"), hosted(Path("lorikeet-nano"), scripted=True, serve_settings=settings) as server:
        catalog = platform_of(server).catalog
        other = Actor(tenant=catalog.people.create_tenant(Actor(), "other").id)
        ours, theirs = (catalog.keys.create(who, "key", "trainer")[1] for who in (Actor(), other))
        reader = catalog.keys.create(Actor(), "reader", "user")[1]
        assert server.state.access is not None
        server.state.access.keys_changed()
        make = "pb.repos.create(name='mine')\nresult = pb.datasets.from_file(path, name='rows').name"
        assert sdk(server.url, make, ours, path=str(rows)).result == "rows"
        assert sdk(server.url, make, theirs, path=str(rows)).result == "rows"  # a name is taken in its tenant alone
        for token, result in ((ours, ["mine"]), (theirs, ["mine"]), (reader, ["mine"])):
            assert sdk(server.url, "result = [one.name for one in pb.repos.list()]", token).result == result
        uuids = {sdk(server.url, "result = pb.repos.get('mine').uuid", one).result for one in (ours, theirs, reader)}
        assert len(uuids) == 2
        assert "trainer" in str(sdk(server.url, "pb.repos.create(name='x')", reader).error)
        assert "trainer" in str(sdk(server.url, "pb.datasets.from_file(path)", reader, path=str(rows)).error)
        assert "401" in str(sdk(server.url, "", "pb_wrong").error)
        address = "pb.deployments.client('lorikeet-nano', serving_url_override=url)"
        foreign = f"pb._session.tenant = '{other.tenant}'\n{address}.generate('x')"
        assert "tenant" in str(sdk(server.url, foreign, reader, url=server.url).error)
        begun = server.http.post("/v2/datasets/upload", json={"fileName": "a.csv"}, headers=bearer(ours)).json()
        assert httpx.put(begun["presignedUrl"], content=b"a" * 2001).status_code == 413
        assert httpx.put(begun["presignedUrl"], content=iter([b"a" * 1001] * 2)).status_code == 413
        assert httpx.put(begun["presignedUrl"], content=b"a,b\n1,2\n").status_code == 200  # without a key
        done = {"name": "stolen", "uploadToken": begun["uploadToken"]}
        stolen = server.http.put("/v2/datasets/upload", json=done, headers=bearer(theirs))
        assert stolen.status_code == 404 and "upload" in stolen.json()["error"]
        with pytest.raises(httpx.HTTPStatusError):
            server.http.get("/v2/repos").raise_for_status()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
