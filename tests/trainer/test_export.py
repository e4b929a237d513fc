import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from upath import UPath

from manifests.errors import ConfigError, ContractError
from trainer import export
from trainer.checkpoint import read_weights
from trainer.config import PretrainConfig
from trainer.export import load_encoder, load_model, read_card, save_encoder
from trainer.export_run import export_run, find_sound
from trainer.loop import pretrain
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoderConfig
from trainer.objectives.build import build_objective
from trainer.run import held_out_windows
from trainer.storage import location


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    encoder = build_encoder(SleepEncoderConfig(width=16, depth=1))
    save_encoder(tmp_path / "encoder", encoder, recipes={"tiny": {"id": "tiny"}}, step=7)
    return tmp_path / "encoder"


def edit(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(card | changes))


def test_the_loaded_encoder_has_the_same_weights_and_sizes(folder: Path) -> None:
    torch.manual_seed(1)
    original = build_encoder(SleepEncoderConfig(width=16, depth=1))
    state = torch.random.get_rng_state()
    loaded = load_encoder(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == original.config
    assert not loaded.training
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    card = read_card(folder)
    assert (card.step, card.recipes) == (7, {"tiny": {"id": "tiny"}})


def test_an_export_replaces_the_earlier_one_as_a_whole(folder: Path) -> None:
    (folder / "leftover").write_text("x")
    save_encoder(folder, load_encoder(folder), recipes={}, step=8)
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.json", "encoder.safetensors"]
    assert read_card(folder).step == 8
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_changed_weights_are_refused(folder: Path) -> None:
    content = bytearray((folder / "encoder.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "encoder.safetensors").write_bytes(content)
    with pytest.raises(ContractError, match="SHA-256"):
        load_encoder(folder)


def test_a_table_that_has_grown_keeps_the_rows_by_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = read_card(folder)
    before = load_encoder(folder).state_dict()
    assert card.site_tables == ["position.anode.weight", "position.cathode.weight"]
    rows = len(before["position.anode.weight"])
    grown_xyz = torch.cat([torch.from_numpy(export_positions()), torch.zeros(3, 3)]).numpy()
    from trainer.models import position

    monkeypatch.setattr(export, "UCS_VERSION", card.ucs_version + 1)
    monkeypatch.setattr(export, "site_ids", lambda: rows + 3)
    monkeypatch.setattr(position, "site_ids", lambda: rows + 3)
    monkeypatch.setattr(position, "positions", lambda: grown_xyz)
    monkeypatch.setattr(export, "table_digest", lambda: "f" * 64)
    table = load_encoder(folder).state_dict()["position.anode.weight"]
    assert len(table) == rows + 3
    assert torch.equal(table[:rows], before["position.anode.weight"])
    assert not table[rows:].any()


def export_positions() -> object:
    from manifests.channels import positions

    return positions()


def test_another_table_of_the_same_version_is_refused(folder: Path) -> None:
    edit(folder, ucs_digest="0" * 64)
    with pytest.raises(ContractError, match="restore the table"):
        load_encoder(folder)


def test_a_newer_table_asks_for_a_newer_kymo(folder: Path) -> None:
    edit(folder, ucs_version=999)
    with pytest.raises(ContractError, match="update kymo"):
        load_encoder(folder)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    card = read_card(folder)
    edit(folder, config=card.config | {"depth": 2})
    with pytest.raises(ContractError, match="does not fit"):
        load_encoder(folder)


@pytest.mark.parametrize(("name", "error"), [("encoder.json", ConfigError), ("encoder.safetensors", ContractError)])
def test_a_folder_without_encoder_and_one_without_weights(
    folder: Path, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    with pytest.raises(error):
        load_encoder(copy)


@pytest.fixture
def finished(tiny_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    """A run with checkpoints of steps 2 and 4, equal in the score that it keeps the best of."""
    config = tiny_config(steps=4, save_every=2, eval_every=2, keep_best="chance", evaluation={"num_windows": 4})
    pretrain(config)
    return config


def test_the_exported_file_gives_the_outputs_of_the_run(finished: PretrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "encoder.safetensors"
    card = export_run(finished.run_dir, out)
    assert (card.step, card.recipes.keys(), card.objective) == (4, {"tiny"}, None)
    from_folder, from_file = load_encoder(Path(finished.run_dir) / "encoder"), load_encoder(out)
    assert from_file.config == from_folder.config
    states = from_folder.state_dict(), from_file.state_dict()
    assert states[0].keys() == states[1].keys()
    objective = build_objective(from_folder, finished.objective)
    batch = objective.collate(held_out_windows(finished), seed=0).to("cpu")
    expected = objective.eval().embed(batch)
    for name, tensor in build_objective(from_file, finished.objective).eval().embed(batch).items():
        assert torch.equal(tensor, expected[name]), name
    assert load_file(out).keys() == states[0].keys()


def test_the_whole_model_comes_back_with_its_objective_and_serves_as_encoder(
    finished: PretrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    export_run(finished.run_dir, out, what="model")
    model = load_model(out)
    stored = read_weights(find_sound(finished.run_dir))
    assert model.state_dict().keys() == stored.keys()
    assert any(not name.startswith("encoder.") for name in stored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    for name, tensor in load_encoder(out).state_dict().items():
        assert torch.equal(tensor, stored[f"encoder.{name}"]), name
    export_run(finished.run_dir, tmp_path / "encoder.safetensors")
    with pytest.raises(ConfigError, match="--what model"):
        load_model(tmp_path / "encoder.safetensors")


def test_bf16_is_half_as_long_and_is_loaded_as_fp32(finished: PretrainConfig, tmp_path: Path) -> None:
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    export_run(finished.run_dir, full)
    export_run(finished.run_dir, half, dtype=torch.bfloat16)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    expected = load_encoder(full).state_dict()
    for name, tensor in load_encoder(half).state_dict().items():
        assert tensor.dtype == expected[name].dtype
        if tensor.is_floating_point():
            assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_a_step_or_the_best_may_be_asked_for_and_a_damaged_checkpoint_is_passed_over(
    finished: PretrainConfig, tmp_path: Path
) -> None:
    assert export_run(finished.run_dir, tmp_path / "a.safetensors", step="2").step == 2
    assert export_run(finished.run_dir, tmp_path / "b.safetensors", step="best").step == 4
    with pytest.raises(ConfigError, match=r"no checkpoint of step '3'; there are: 4, 2"):
        export_run(finished.run_dir, tmp_path / "c.safetensors", step="3")
    newest = find_sound(finished.run_dir)
    (newest / "aux.safetensors").write_bytes(b"damaged")
    assert export_run(finished.run_dir, tmp_path / "d.safetensors").step == 2
    with pytest.raises(ContractError, match=r"aux\.safetensors"):
        export_run(finished.run_dir, tmp_path / "e.safetensors", step="4")
    assert newest.exists(), "reading a run changes nothing in it"


def test_what_cannot_be_exported_is_told(finished: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint; give the folder of a pretraining run"):
        export_run(str(tmp_path / "nowhere"), tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"end in \.safetensors"):
        export_run(finished.run_dir, tmp_path / "out.bin")
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        export_run(finished.run_dir, tmp_path / "out.safetensors")
    with pytest.raises(ContractError, match="not a file that kymo export wrote"):
        load_encoder(tmp_path / "out.safetensors")
    export_run(finished.run_dir, tmp_path / "other.safetensors")
    content = bytearray((tmp_path / "other.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(ContractError, match="SHA-256"):
        load_encoder(tmp_path / "other.safetensors")


@pytest.mark.usefixtures("s3")
def test_a_run_whose_checkpoints_lie_in_a_store_is_exported_to_a_file_or_into_the_store(
    tiny_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    storage = f"s3://bucket/{tmp_path.name}"
    config = tiny_config(steps=2, evaluation=None, storage=storage)
    pretrain(config)
    for number, run in enumerate((config.run_dir, storage)):
        assert export_run(run, tmp_path / f"{number}.safetensors").step == 2
    target = location(f"{storage}/exported.safetensors")
    export_run(storage, target)
    assert target.read_bytes() == (tmp_path / "0.safetensors").read_bytes()
