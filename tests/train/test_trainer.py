"""`lorikeet train` from recipe to folder: what peft loads, what a resumed run does, what a signal leaves."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tests.fixtures import oracle, sample_tokens
from tests.quantised import quantise, quantised_oracle
from tests.train.small import packed_batch

from lorikeet.adapters.configs import read_config
from lorikeet.adapters.files import read_lock
from lorikeet.adapters.fuse import BaseModel, fuse
from lorikeet.errors import ConfigError, DataError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.families import read_json
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load
from lorikeet.train import trainer
from lorikeet.train.joint import JointTrainer
from lorikeet.train.trainer import Summary, TrainingError, run_train

Checkpoint = Callable[..., Path]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "some"]


def make_recipe(folder: Path, base: Path, only: list[int] | None = None, **changes: Any) -> Path:
    """Three adapters with data of their own; `only` keeps some of them."""
    adapters: list[dict[str, Any]] = [
        {"name": "first", "data": {"validation": 0.2}, "dropout": 0.1, "seed": 2},
        {"name": "second", "rank": 2, "targets": ["q", "v"], "epochs": 2, "batch_rows": 3, "rslora": True},
        {"name": "third", "data": {"validation": 0.2}, "early_stopping": {"patience": 1}, "learning_rate": 0.05},
    ]
    for i, adapter in enumerate(adapters):
        path = folder / f"{adapter['name']}.jsonl"
        rows = ({"text": f"{WORDS[(n + i) % 12]} {WORDS[n * 5 % 11]} {n}", "label": WORDS[n % 4]} for n in range(20))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        adapter["data"] = {"train": path.name, **adapter.get("data", {})}
        adapter |= {"prompt": "Text: {text}\nLabel:", "completion": " {label}"}
    recipe = {
        "version": 1,
        "base": str(base),
        "output": "out",
        "dtype": "float32",
        "step_tokens": 200,
        "defaults": {"epochs": 4, "rank": 4, "alpha": 8, "learning_rate": 0.01, "batch_rows": 4},
        "adapters": [adapters[i] for i in only or range(3)],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(path: Path, **options: Any) -> Summary:
    console = Console(file=StringIO(), width=160)
    summary = run_train(path, root=path.parent, console=console, **options)
    assert summary is not None
    return summary


def losses(output: Path) -> dict[tuple[str, int, str], float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = {(line["adapter"], line["step"], line["split"]): line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test; this fixture outlives them
    train(make_recipe(folder, checkpoint("llama")))
    torch.set_num_threads(threads)
    return folder / "out"


def test_what_a_run_leaves(trained: Path, checkpoint: Checkpoint) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    base = identify(checkpoint("llama"), str(checkpoint("llama")))
    assert sorted(summary["adapters"]) == ["first", "second", "third"] and not summary["interrupted"]
    shares = [adapter["train_seconds"] for adapter in summary["adapters"].values()]
    assert summary["joint_wall_seconds"] == pytest.approx(sum(shares))
    for name, adapter in summary["adapters"].items():
        assert adapter["adapter_bytes"] == (trained / name / "adapter_model.safetensors").stat().st_size
        assert adapter["tokens"] > 0 and adapter["loss"] > 0
        lock = read_lock(trained / name)
        assert lock is not None and lock.template is not None
        assert (lock.base.sha256, lock.tokenizer_sha256) == (base.sha256, base.tokenizer_sha256)
        assert (lock.template.kind, lock.template.text) == ("prompt", "Text: {text}\nLabel:")
        assert lock.data_sha256 and lock.recipe_sha256 and lock.code_version
    config = read_config(trained / "second")
    assert config.r == 2 and config.use_rslora and sorted(config.target_modules) == ["q_proj", "v_proj"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    keys = ["v", "t", "run", "adapter", "step", "split", "loss", "tokens", "lr", "grad_norm", "seconds"]
    assert all(list(line) == keys for line in lines)
    assert {line["adapter"] for line in lines if line["split"] == "validation"} == {"first", "third"}
    first = [line["loss"] for line in lines if line["adapter"] == "second"]
    assert first[-1] < first[0] - 0.5


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_peft_loads_the_output(trained: Path, checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """The same logits in transformers + peft and in our forward with our reading of the file."""
    from peft import PeftModel
    from tests.fixtures import make_slab
    from transformers import AutoModelForCausalLM

    from lorikeet.adapters.compiled import compile_adapter

    folder = checkpoint("llama")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), trained / name)
    batch = packed_batch([11], [0])
    theirs = model(batch.tokens[None]).logits[0].detach()
    with model.disable_adapter():
        assert (model(batch.tokens[None]).logits[0] - theirs).abs().mean() > 0.1
    spec, weights = load(folder, torch.float32)
    compiled = compile_adapter(trained / name, spec, identify(folder), "float32", tmp_path)
    ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(compiled.path)], spec))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Stop(Exception):
    """Stands for a process that is killed."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, how: Callable[[], None]) -> None:
    step, taken = JointTrainer.step, []

    def counted(self: JointTrainer) -> Any:
        if len(taken) == after:
            how()
        taken.append(1)
        return step(self)

    monkeypatch.setattr(JointTrainer, "step", counted)


def kill() -> None:
    raise Stop


@pytest.mark.parametrize("after", [3, 11])
def test_resumed_is_uninterrupted(
    trained: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed after some steps, gone on in another grouping: the losses and weights of the whole run."""
    base = checkpoint("llama")
    with monkeypatch.context() as patch:
        interrupt(patch, after, kill)
        with pytest.raises(Stop):
            train(make_recipe(tmp_path, base))
    if after == 3:
        train(make_recipe(tmp_path, base, only=[1]), resume=True)
    summary = train(make_recipe(tmp_path, base), resume=True)
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), rel=1e-5)
    for name, adapter in summary.adapters.items():
        from safetensors.torch import load_file

        ours = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        for key, tensor in load_file(trained / name / "adapter_model.safetensors").items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)
        assert adapter.stopped is not None


def test_a_signal_ends_cleanly(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        summary = train(make_recipe(tmp_path, checkpoint("llama")))
    assert summary.interrupted and {a.steps for a in summary.adapters.values()} == {3}
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out" / "first").exists()
    assert not train(make_recipe(tmp_path, checkpoint("llama")), resume=True).interrupted


def test_resume_refuses_another_recipe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    train(make_recipe(tmp_path, base, only=[1]))
    with pytest.raises(ConfigError, match="other settings, data or base than the recipe now has for 'second'"):
        train(make_recipe(tmp_path, base, only=[1], defaults={"learning_rate": 0.02}), resume=True)
    path = tmp_path / "out" / "checkpoints" / "second.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        train(make_recipe(tmp_path, base, only=[1]), resume=True)
    train(make_recipe(tmp_path, base, only=[1]))


def test_a_finished_run_resumes_to_itself(
    trained: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_recipe(tmp_path, checkpoint("llama"), only=[1]))
    weights = (tmp_path / "out" / "second" / "adapter_model.safetensors").read_bytes()
    interrupt(monkeypatch, 0, kill)
    train(make_recipe(tmp_path, checkpoint("llama"), only=[1]), resume=True)
    assert (tmp_path / "out" / "second" / "adapter_model.safetensors").read_bytes() == weights


def test_not_finite_is_an_error_of_one_adapter(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = trainer.make_trainee

    def poisoned(recipe: Any, *rest: Any) -> Any:
        job = make(recipe, *rest)
        if recipe.name == "first":
            job.run.parameters.data.fill_(float("nan"))
            job.run.parameters.refresh()
        return job

    monkeypatch.setattr(trainer, "make_trainee", poisoned)
    with pytest.raises(TrainingError, match="the loss of first was not finite"):
        train(make_recipe(tmp_path, checkpoint("llama")))
    assert not (tmp_path / "out" / "first").exists() and (tmp_path / "out" / "second").exists()


def test_bad_data_takes_no_step(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = make_recipe(tmp_path, checkpoint("llama"))
    with (tmp_path / "second.jsonl").open("a") as file:
        file.write('{"text": "x"}\n')
    with pytest.raises(
        DataError, match=r"second: 1 broken rows:\n.*second\.jsonl:21: second\.completion: column 'label'"
    ):
        train(path)
    assert not (tmp_path / "out").exists()


def test_dry_run_audits_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = StringIO()
    path = make_recipe(tmp_path, checkpoint("llama"))
    assert run_train(path, root=tmp_path, dry_run=True, console=Console(file=out, width=160)) is None
    assert "first" in out.getvalue() and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # bitsandbytes', of dtypes
def test_a_base_in_four_bits(tmp_path: Path) -> None:
    """Trained over what bitsandbytes stored: fusing takes the lock, and makes what peft has of base and adapter."""
    quantise("llama", tmp_path, "nf4-double")
    base, adapter = tmp_path / "base", tmp_path / "out" / "second"
    train(make_recipe(tmp_path, base, only=[1]))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    config, spec = read_json(base / "config.json"), load(base, torch.float32)[0]
    model = BaseModel(
        folder=base, files=checkpoint_files(base), config=config, spec=spec, identity=lambda: identify(base)
    )
    fuse(model, adapter, tmp_path / "fused", dtype="float32")
    row = sample_tokens(1, 30)
    with torch.no_grad():
        theirs = quantised_oracle(base, adapter)(row).logits.log_softmax(-1)
        torch.testing.assert_close(oracle(tmp_path / "fused")(row).logits.log_softmax(-1), theirs, atol=1e-4, rtol=0)
