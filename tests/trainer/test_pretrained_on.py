import pytest

from trainer.export import read_card
from trainer.export_run import export_run
from trainer.loop import pretrain
from trainer.pretrained_on import read_pretrained_on


def test_persons_windows_and_hours_of_the_split_are_counted(tiny_config) -> None:
    facts = read_pretrained_on(tiny_config())
    tiny = facts.corpora["tiny"]
    assert (tiny["subjects"], tiny["windows"]) == (4, 32)
    assert tiny["hours"] == pytest.approx(32 * 8 / 3600, abs=1e-3)
    assert facts.subjects is not None
    assert len(facts.subjects["tiny"]) == 4
    assert len(facts.snapshots[0]) == 64
    assert facts.without_subjects().subjects is None
    assert facts.without_subjects().corpora == facts.corpora


def test_a_snapshot_that_is_gone_is_told(tiny_config) -> None:
    config = tiny_config()
    gone = config.model_copy(update={"snapshots": [config.snapshots[0].model_copy(update={"path": "/nowhere/s"})]})
    facts = read_pretrained_on(gone)
    assert facts.unknown == ["snapshot s of the pretraining is not there any more"]
    assert facts.corpora == {}


@pytest.mark.parametrize("corpora", [["other"], None])
def test_corpora_that_the_run_left_out_were_not_seen(tiny_config, corpora) -> None:
    facts = read_pretrained_on(tiny_config(filter={"corpora": corpora}))
    assert set(facts.corpora) == (set() if corpora else {"tiny"})


def test_run_and_export_write_it_with_the_licence_into_the_card(tiny_config, tmp_path) -> None:
    config = tiny_config(steps=1, evaluation=None, licence="cc-by-4.0")
    pretrain(config)
    folder = read_card(f"{config.run_dir}/encoder")
    assert folder.pretrained_on == read_pretrained_on(config)
    assert folder.licence == "cc-by-4.0"
    file = export_run(config.run_dir, tmp_path / "a.safetensors")
    assert (file.licence, file.pretrained_on) == ("cc-by-4.0", folder.pretrained_on)
    assert export_run(config.run_dir, tmp_path / "b.safetensors", licence="mit").licence == "mit"
