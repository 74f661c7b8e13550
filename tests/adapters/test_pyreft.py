"""pyreft's folders become LoReFT adapters: against a hook that is written as pyreft's intervention is.

The folders are made as pyreft 0.1.0 with pyvene 0.1.8 writes them, and were compared with its own once.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.fixtures import make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.adapters.configs import CONFIG, LoreftConfig, read_config
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.pyreft import import_pyreft, parse_positions
from lorikeet.errors import AdapterError, ConfigError
from lorikeet.kernels.batch import Segments
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import identify
from lorikeet.model.weights import load

State = dict[str, torch.Tensor]
HIDDEN = 64


class Intervention(torch.nn.Module):
    """h + (act(W h + b) - h R) R^T, with R orthonormal; its state is what pyreft saves."""

    def __init__(self, seed: int, rank: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rotate_layer = torch.linalg.qr(torch.randn(HIDDEN, rank))[0].contiguous()
        self.learned_source = torch.nn.Linear(HIDDEN, rank)
        torch.nn.init.normal_(self.learned_source.weight, 0, HIDDEN**-0.5)
        torch.nn.init.normal_(self.learned_source.bias)

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return base + (self.learned_source(base) - base @ self.rotate_layer) @ self.rotate_layer.T

    def state(self) -> State:
        return {**self.learned_source.state_dict(), "rotate_layer": self.rotate_layer}


def save(folder: Path, layers: dict[str, State], **config: Any) -> Path:
    """`layers` maps keys, such as `3` or `model.layers[3].output`, with `#1` for a second one, to states."""
    folder.mkdir(parents=True)
    keys, representations = [], []
    for key, state in layers.items():
        place, _, again = key.partition("#")
        component = "block_output" if place.isdigit() else place
        start = f"layer_{place}_" if place.isdigit() else ""
        keys.append(f"{start}comp_{component.replace('.', '_')}_unit_pos_nunit_1#{again or 0}")
        torch.save(state, folder / f"intkey_{keys[-1]}.bin")
        layer = int(place) if place.isdigit() else 0
        representations.append([layer, component, "pos", 1, len(state["bias"]), *[None] * 9])
    said = {
        "intervention_constant_sources": [True] * len(layers),
        "intervention_dimensions": [HIDDEN] * len(layers),
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * len(layers),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
        "transformers_version": "4.45.1",
    }
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("keys", [["1"], ["0", "2"], ["model.layers[1].output"], ["0", "2", "0#1", "2#1"]])
def test_what_is_imported_is_pyrefts_intervention(
    keys: list[str], left_out: int, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    spec, weights = load(base, torch.float32)
    numbers = {key: int("".join(c for c in key.partition("#")[0] if c.isdigit())) for key in keys}
    interventions = {number: Intervention(number) for number in set(numbers.values())}
    folder = save(tmp_path / "theirs", {key: interventions[number].state() for key, number in numbers.items()})
    ranks = import_pyreft(folder, tmp_path / "ours", positions="f2+l3", last_offset=left_out)
    assert ranks == dict.fromkeys(sorted(interventions), 4)
    info = compile_adapter(tmp_path / "ours", spec, identify(base), "float32", cache)
    assert info.positions == (2, 3, left_out)
    row = sample_tokens(1, 20, 8)[0]
    end = len(row) - left_out
    places = [0, 1, end - 3, end - 2, end - 1]
    model = oracle(base)
    for number, intervention in interventions.items():
        model.model.layers[number].register_forward_hook(hook(intervention, places))
    with torch.no_grad():
        plain = oracle(base)(row.unsqueeze(0)).logits[0].log_softmax(-1)
        theirs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
        batch = make_batch([row], [0])
        batch.token_segments = Segments(torch.tensor(places), [0, len(places)], [0], False)
        ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(info.path)], spec)).log_softmax(-1)
    assert (theirs - plain).abs().mean() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def hook(intervention: Intervention, places: list[int]) -> Callable[..., Any]:
    def change(module: Any, inputs: Any, output: Any) -> Any:
        stream = output if isinstance(output, torch.Tensor) else output[0]
        stream[:, places] = intervention(stream[:, places])
        return output

    return change


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    """State dicts in `intervenable_model`, no config, and the base's trained parameters: none."""
    state = Intervention(0).state()
    save(tmp_path / "checkpoint-5" / "intervenable_model", {"3": state | {"weight": state["weight"].bfloat16()}})
    inner = tmp_path / "checkpoint-5" / "intervenable_model"
    (inner / "config.json").unlink()
    torch.save({}, inner / "pytorch_model.bin")
    assert import_pyreft(tmp_path / "checkpoint-5", tmp_path / "ours", positions="l1") == {3: 4}
    assert read_config(tmp_path / "ours") == LoreftConfig(r=4, layers=(3,), positions=(0, 1, 0))
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    torch.testing.assert_close(tensors["reft.layers.3.weight"], state["weight"].bfloat16().float(), atol=0, rtol=0)
    torch.save({"lm_head.weight": torch.ones(2, 2)}, inner / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin: lm_head\.weight: parameters of the base"):
        import_pyreft(tmp_path / "checkpoint-5", tmp_path / "again", positions="l1")


def test_positions_of_the_training_script(tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {"1": Intervention(0).state()})
    with pytest.raises(ConfigError, match="--positions: expected such as f7.l7, found none"):
        import_pyreft(folder, tmp_path / "ours")
    (folder / "args.json").write_text(json.dumps({"position": "f5+l6", "act_fn": None, "dropout": 0.05}))
    import_pyreft(folder, tmp_path / "ours")
    assert read_config(tmp_path / "ours").positions == (5, 6, 0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"--positions: found f1, but args\.json says f5\+l6"):
        import_pyreft(folder, tmp_path / "again", positions="f1")
    (folder / "args.json").write_text(json.dumps({"position": "f5+l6", "act_fn": "relu"}))
    with pytest.raises(AdapterError, match=r"args\.json: act_fn: expected null or 'linear', found 'relu'"):
        import_pyreft(folder, tmp_path / "again", positions="f5+l6")


@pytest.mark.parametrize(("text", "counts"), [("f7+l7", (7, 7)), ("f1", (1, 0)), ("l12", (0, 12)), ("f0+l2", (0, 2))])
def test_positions(text: str, counts: tuple[int, int]) -> None:
    assert parse_positions(text) == counts


@pytest.mark.parametrize("text", ["", "7", "l7+f7", "f", "f0", "f1+", "f1 + l1", "f-1", "all", "f1+l1+l2"])
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--positions: found"):
        parse_positions(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intervention_types": ["<class 'pyreft.interventions.DireftIntervention'>"]}, "intervention_types: expected"),
        ({"intervention_types": None}, "intervention_types: expected LoreftIntervention, found 'None'"),
        ({"mode": "serial"}, "mode: expected 'parallel', found 'serial'"),
        ({"sorted_keys": ["layer_9_comp_block_output_unit_pos_nunit_1#0"]}, "sorted_keys: expected those of intkey_la"),
        ({"representations": [[1, "mlp_output", "pos", 1, 4]]}, "component: expected block_output, found 'mlp_output'"),
        ({"representations": [{"layer": 1, "unit": "h.pos"}]}, r"unit: expected 'pos', found 'h\.pos'"),
        ({"representations": [[1, "block_output", "pos", 1, 4, None, None, [[0, 2]]]]}, "subspace_partition: expected"),
        ({"representations": 3}, "representations: expected a list, found '3'"),
    ],
)
def test_configs_that_are_not_loreft_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {"1": Intervention(0).state()}, **change)
    with pytest.raises(AdapterError, match=message):
        import_pyreft(folder, tmp_path / "ours", positions="l1")
    assert not (tmp_path / "ours").exists()


class Runs:
    """What a pickle of code is."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rotate_layer.parametrizations.weight.0.base": torch.ones(64, 64)},
            "expected bias, rotate_layer, weight",
        ),
        ({"weight": torch.ones(4, 65)}, r"weight: expected \[4, 64\] beside a rotation of \[64, 4\], found \[4, 65\]"),
        ({"bias": torch.full((4,), float("nan"))}, "bias: some values are NaN"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias: expected a tensor of floating-point numbers"),
        ({"rotate_layer": torch.ones(64)}, r"expected \[0, 0\] beside a rotation of \[64\]"),
        ({"bias": Runs()}, "holds more than tensors, or is damaged"),
    ],
)
def test_files_that_are_not_loreft_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {"1": Intervention(0).state()})
    path = next(folder.glob("*.bin"))
    torch.save(Intervention(0).state() | change, path)
    with pytest.raises(AdapterError, match=message):
        import_pyreft(folder, tmp_path / "ours", positions="l1")


def test_files_that_torch_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "theirs", {"1": Intervention(0).state()})
    path = next(folder.glob("*.bin"))
    with zipfile.ZipFile(path) as stored:
        parts = {one.filename: stored.read(one) for one in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
    with pytest.raises(AdapterError, match="its parts are compressed"):
        import_pyreft(folder, tmp_path / "ours", positions="l1")
    torch.save({"weight": Runs()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match=r"not a file of torch\.save"):
        import_pyreft(folder, tmp_path / "ours", positions="l1")
    torch.save([1, 2], path)
    with pytest.raises(AdapterError, match="expected a dict of tensors, found list"):
        import_pyreft(folder, tmp_path / "ours", positions="l1")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": 0, "1#1": 5}, "layer 1 has other weights for the last tokens than for the first"),
        ({"model.embed_tokens.output": 0}, r"component: expected block_output, found 'model\.embed_tokens\.output'"),
    ],
)
def test_places_that_are_not_supported(layers: dict[str, int], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {key: Intervention(seed).state() for key, seed in layers.items()})
    with pytest.raises(AdapterError, match=message):
        import_pyreft(folder, tmp_path / "ours", positions="f1+l1")


def test_places_are_read_from_the_names_of_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {"model.embed_tokens.output": Intervention(0).state()})
    (folder / "config.json").unlink()
    with pytest.raises(AdapterError, match="not an intervention on the output of a layer"):
        import_pyreft(folder, tmp_path / "ours", positions="l1")
    path = next(folder.glob("*.bin"))
    path.rename(folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_2#0.bin")
    with pytest.raises(AdapterError, match="expected unit pos and 1 of them, found pos and 2"):
        import_pyreft(folder, tmp_path / "ours", positions="l1")


def test_ranks_that_differ_and_folders_without_interventions(tmp_path: Path) -> None:
    states = {"1": Intervention(0).state(), "2": Intervention(0, rank=2).state()}
    with pytest.raises(AdapterError, match=r"expected one rank for all layers, found \{1: 4, 2: 2\}"):
        import_pyreft(save(tmp_path / "theirs", states), tmp_path / "ours", positions="f1")
    with pytest.raises(AdapterError, match="no interventions of pyreft"):
        import_pyreft(tmp_path, tmp_path / "ours", positions="f1")


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", {"1": Intervention(0).state()})
    (tmp_path / "home").mkdir()
    with pytest.raises(ConfigError, match="exists and is not an adapter's folder"):
        import_pyreft(folder, tmp_path / "home", positions="f1", force=True)
    import_pyreft(folder, tmp_path / "ours", positions="f1")
    with pytest.raises(ConfigError, match="exists"):
        import_pyreft(folder, tmp_path / "ours", positions="f2")
    import_pyreft(folder, tmp_path / "ours", positions="f2", force=True)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["first_positions"] == 2
