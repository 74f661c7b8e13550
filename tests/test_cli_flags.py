"""`lorikeet serve` and `lorikeet up` are one server: their flags agree, and each one reaches what it sets."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from typing import Any, get_args

import pytest
from msgspec.structs import asdict
from typer.testing import CliRunner

from lorikeet.cli import app
from lorikeet.config import EngineConfig, ServeConfig, SourceConfig
from lorikeet.errors import ConfigError

TENANTS = "a server without a catalog has one tenant"
PLATFORM = "there is nothing to keep or to train without a home"
ONE_SIDED = {
    "serve": {
        "--adapters": "the registry's names are the only ones, so that each tenant has its own",
        "--api-key": "its keys have roles, tenants and an end: `lorikeet keys`",
    },
    "up": {
        **dict.fromkeys(("--tenant-queue", "--tenant-weight"), TENANTS),
        **dict.fromkeys(("--home", "--catalog", "--blobs", "--max-upload", "--join"), PLATFORM),
        **dict.fromkeys(("--job-concurrency", "--job-memory", "--job-threads"), PLATFORM),
    },
}
NO_FLAG = {  # of the engine
    "block_size": "the kernels are tuned for one",
    "prefix_cache": "it costs nothing; tests do without it",
}
# a value of each flag that is not its default, and the field it sets where that has another name or value
ENGINE = {
    "model": "other",
    "device": "cpu",
    "dtype": "float32",
    "quantize": "int8",
    "kv_cache_dtype": "fp8",
    "tensor_parallel": 2,
    "threads": 3,
    "max_seqs": 5,
    "step_tokens": 99,
    "max_context": 77,
    "chunk_tokens": 9,
    "adapter_dtype": "bfloat16",
    "queue": 11,
}
SIZES = ("kv_memory", "adapter_memory", "adapter_host_memory", "adapter_disk")
ON = {"allow_lock_mismatch": "--allow-lock-mismatch"}
OFF = {"fair": "--no-fair"}
TENANT = {"tenant_queue": ("--tenant-queue=4", 4), "tenant_weights": ("--tenant-weight=acme=2", {"acme": 2.0})}
SOURCES = {
    "allow_private": ("--allow-private-sources", True),
    "use_proxy": ("--source-proxy", True),
    "s3_endpoint": ("--s3-endpoint=http://s3", "http://s3"),
    "max_bytes": ("--max-adapter-bytes=1MiB", 2**20),
    "cache_bytes": ("--download-disk=2MiB", 2**21),
    "total_seconds": ("--fetch-seconds=7", 7.0),
}
SERVER: dict[str, tuple[list[str], Any]] = {
    "host": (["--host=::1"], "::1"),
    "port": (["--port=1234"], 1234),
    "drain_seconds": (["--drain-seconds=2"], 2.0),
    "cors_origins": (["--cors-origin=https://a", "--cors-origin=https://b"], ("https://a", "https://b")),
    "allowed_hosts": (["--allowed-host=box"], ("box",)),
    "adapter_sources": (["--adapter-sources=hf, s3"], ("hf", "s3")),
}


def flags(command: str) -> dict[str, tuple[Any, ...]]:
    """Type, default and all that help and parser are told of each flag."""
    callback = next(
        one.callback for one in app.registered_commands if one.callback and one.callback.__name__ == command
    )
    found = {}
    for one in signature(callback).parameters.values():
        kind, option = get_args(one.annotation)
        found["--" + one.name.replace("_", "-")] = (kind, one.default, vars(option))
    return found


def test_serve_and_up_have_the_same_flags() -> None:
    serve, up = flags("serve"), flags("up")
    assert serve.keys() - up.keys() == ONE_SIDED["serve"].keys()
    assert up.keys() - serve.keys() == ONE_SIDED["up"].keys()
    for name in serve.keys() & up.keys():
        assert serve[name] == up[name]


def test_bench_has_the_flags_of_a_step_as_serve_has_them() -> None:
    bench, serve = flags("bench"), flags("serve")
    shared = bench.keys() & serve.keys() - {"--adapters"}
    assert {"--model", "--device", "--dtype", "--quantize", "--threads", "--max-seqs", "--step-tokens"} <= shared
    assert all(bench[name] == serve[name] for name in shared)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """The configs that servers would be started with."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("lorikeet.server.serve.run_serve", configs.append)
    monkeypatch.setattr("lorikeet.server.serve.run_up", configs.append)
    return configs


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["serve", "up"])
def test_without_flags_everything_is_as_the_configs_say(command: str, started: list[ServeConfig]) -> None:
    run(command)
    assert started[0].engine == EngineConfig() and started[0].sources == SourceConfig()
    changed = {name for name, value in asdict(started[0]).items() if value != asdict(ServeConfig())[name]}
    assert changed == ({"platform"} if command == "up" else set())


@pytest.mark.parametrize("command", ["serve", "up"])
def test_every_flag_reaches_its_field(command: str, started: list[ServeConfig]) -> None:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    given += [f"--{name.replace('_', '-')}={i + 1}KiB" for i, name in enumerate(SIZES)]
    given += [*ON.values(), *OFF.values(), *(flag for flag, _ in SOURCES.values())]
    given += [flag for several, _ in SERVER.values() for flag in several]
    expected = ENGINE | {name: (i + 1) * 1024 for i, name in enumerate(SIZES)}
    expected |= dict.fromkeys(ON, True) | dict.fromkeys(OFF, False)
    if command == "up":
        given += [flag for flag, _ in TENANT.values()]
        expected |= {name: value for name, (_, value) in TENANT.items()}
    run(command, *given)
    config = started[0]
    assert {name: getattr(config.engine, name) for name in expected} == expected
    assert {name: getattr(config.sources, name) for name in SOURCES} == {
        name: what for name, (_, what) in SOURCES.items()
    }
    assert {name: getattr(config, name) for name in SERVER} == {name: what for name, (_, what) in SERVER.items()}
    reached = {name for name in EngineConfig.__struct_fields__ if getattr(config.engine, name) != default_of(name)}
    left = set(EngineConfig.__struct_fields__) - reached - NO_FLAG.keys()
    assert left == (set() if command == "up" else TENANT.keys())


def default_of(name: str) -> Any:
    return getattr(EngineConfig(), name)


@pytest.mark.parametrize("command", ["serve", "up"])
@pytest.mark.parametrize(
    "flag, said",
    [
        ("--device=tpu", "--device: found 'tpu'; expected auto | cpu | cuda"),
        ("--adapter-dtype=int4", "--adapter-dtype: found 'int4'; expected auto | float32 | bfloat16"),
        ("--adapter-disk=lots", "--adapter-disk: found 'lots'; expected bytes or a size such as 512MiB or 2GiB"),
        ("--max-adapter-bytes=0", "--max-adapter-bytes: found '0'; expected a size above zero"),
        ("--adapter-sources=hf,ftp", "--adapter-sources: found 'ftp'; expected hf | s3 | gs | az | https"),
    ],
)
def test_values_are_refused_in_the_same_words(command: str, flag: str, said: str, started: list[ServeConfig]) -> None:
    with pytest.raises(ConfigError) as refused:
        run(command, flag)
    assert refused.value.message == said and not started


@pytest.mark.parametrize("weight", ["acme", "acme=", "=2", "acme=0", "acme=inf", "acme=many"])
def test_weights_of_tenants_are_numbers_above_zero(weight: str, started: list[ServeConfig]) -> None:
    with pytest.raises(ConfigError, match="--tenant-weight: found .*expected such as acme=2"):
        run("up", "--tenant-weight", weight)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "torch", "numba", "yaml", "sqlalchemy", "fastapi", "httpx", "uvicorn", "zmq")
    code = f"import sys, lorikeet.cli; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
