import json
import shutil
from pathlib import Path

import pytest
import torch

from manifests.errors import ConfigError, ContractError
from trainer import export
from trainer.export import load_encoder, read_card, save_encoder
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoderConfig


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
