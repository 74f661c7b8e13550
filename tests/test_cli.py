import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import typer
from tests.adapters.servers import file_server, publish
from typer.models import CommandInfo
from typer.testing import CliRunner

from lorikeet.cli import app


def commands(group: typer.Typer, *path: str) -> Iterator[tuple[tuple[str, ...], CommandInfo]]:
    """Every command with the words that call it."""
    for one in group.registered_commands:
        assert one.callback is not None
        yield (*path, one.name or one.callback.__name__), one
    for inner in group.registered_groups:
        assert inner.typer_instance is not None and inner.name is not None
        yield from commands(inner.typer_instance, *path, inner.name)


COMMANDS = dict(commands(app))


def lorikeet(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorikeet", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_explains_everything_and_has_examples(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    said = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert said.exit_code == 0 and "Examples" in said.stdout
    assert (command.epilog or "").count(f"lorikeet {' '.join(path)}") >= 1
    assert command.callback is not None and (command.callback.__doc__ or "").endswith((".", "?"))
    for name, parameter in signature(command.callback, eval_str=True).parameters.items():
        (told,) = get_args(parameter.annotation)[1:]
        assert told.help, f"{name} is not explained"


def test_the_program_itself_says_what_there_is() -> None:
    result = lorikeet("--help")
    assert result.returncode == 0 and all(path[0] in result.stdout for path in COMMANDS)


def test_adapters_of_the_hub_are_merged(adapters: Callable[..., list[Path]], tmp_path: Path) -> None:
    one, other = adapters("llama", 2)
    with file_server() as hub:
        publish(hub, "org/one", {path.name: path.read_bytes() for path in one.iterdir()})
        asked = ("adapters", "merge", "hf://org/one", str(other), "--weights", "1,-1", "--method", "cat", "--output")
        env = {"HF_ENDPOINT": hub.url, "LORIKEET_CACHE": str(tmp_path / "cache")}
        result = lorikeet(*asked, "merged", cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        assert "hf://org/one: " in result.stderr and "merged: 21 modules, rank 1 to 3" in result.stdout
        result = lorikeet(*asked[:2], "hf://org/none", *asked[3:], "again", cwd=tmp_path, env=env)
    assert result.returncode == 2 and "hf://org/none is not there" in result.stderr


def test_what_pyreft_does_not_say_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(b"")
    result = lorikeet("adapters", "import-pyreft", str(tmp_path), "--output", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "--positions: expected such as f7+l7, found none" in result.stderr


def test_a_users_mistake_is_a_message_and_exit_code_2(tmp_path: Path) -> None:
    result = lorikeet("train", "nowhere.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "recipe nowhere.yaml does not exist" in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_are_checked_by_name() -> None:
    result = lorikeet("serve", "--dtype", "float8")
    assert result.returncode == 2
    assert "--dtype: found 'float8'; expected auto | float32 | bfloat16" in result.stderr
    result = lorikeet("serve", "--kv-memory", "lots")
    assert result.returncode == 2
    assert "--kv-memory: found 'lots'" in result.stderr


def test_adapter_host_memory_is_refused_without_a_gpu() -> None:
    result = lorikeet("serve", "--device", "cpu", "--adapter-host-memory", "1GiB")
    assert result.returncode == 2
    assert "adapter_host_memory: not available on a CPU" in result.stderr
