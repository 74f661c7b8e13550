import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.adapters.servers import file_server, publish

COMMANDS = ["serve", "train", "eval", "demo", "pretrain", "simulate", "bench"]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = lorikeet(command, "--help")
    assert result.returncode == 0
    assert "Examples" in result.stdout
    assert f"lorikeet {command}" in result.stdout


@pytest.mark.parametrize("command", ["merge", "fuse", "import-pyreft"])
def test_help_of_what_is_done_to_adapters_has_examples(command: str) -> None:
    result = lorikeet("adapters", command, "--help")
    assert result.returncode == 0
    assert f"lorikeet adapters {command}" in result.stdout


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
