import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["serve", "train", "eval", "demo", "pretrain", "simulate", "bench"]


def lorikeet(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorikeet", *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = lorikeet(command, "--help")
    assert result.returncode == 0
    assert "Examples" in result.stdout
    assert f"lorikeet {command}" in result.stdout


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
