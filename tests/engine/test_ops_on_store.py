"""What an operator does with a conversion whose output lies on an object store, against moto's S3 on loopback."""

import time
from pathlib import Path

import pytest
from upath import UPath

from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.copies import local_copy
from engine.difference import difference
from engine.files import corpus_files, identity_of
from engine.heartbeat import Heartbeat, heartbeat_path
from engine.preview import draw_sample, first_key
from engine.quarantine import evidence, rejected, retry, waive
from engine.read import read_header
from engine.repack import repack
from engine.report import write_report
from engine.status import status
from engine.storage import location, upload
from engine.verify import verify
from manifests.corpora import load_corpus
from manifests.errors import ConfigError
from manifests.shards import load_snapshot

BUCKET = "ops"


@pytest.fixture
def bucket(s3: None) -> Path:
    """An empty folder on an S3 server of the test's own."""
    UPath(f"s3://{BUCKET}").fs.makedirs(BUCKET, exist_ok=True)
    return location(f"s3://{BUCKET}/out")


def test_everything_that_reads_a_snapshot_reads_it_from_a_store(
    converted: ConvertConfig, bucket: Path, tmp_path: Path
) -> None:
    config = converted.model_copy(update={"output": bucket})
    convert_all(config)
    state = status(bucket)
    assert state.is_final
    assert not state.is_running
    assert verify(bucket, deep=True, source=True).is_sound
    assert difference(converted.output, bucket).num_read == 0
    assert repack(bucket, tmp_path / "a").digest == repack(converted.output, tmp_path / "b").digest
    with pytest.raises(ConfigError, match="give a local --out"):
        repack(converted.output, bucket / "c")

    assert draw_sample(bucket, first_key(bucket), tmp_path / "preview.png").stat().st_size > 10_000
    assert "Hours by corpus and kind" in write_report(bucket, tmp_path / "page.html").read_text()

    (item,) = rejected(bucket)
    assert not evidence(bucket, item.path).is_changed
    waive(bucket, [item.path], note="accepted")
    assert rejected(bucket)[0].state == "waived"
    assert retry(bucket, [item.path]) == [item.unit]
    assert rejected(bucket)[0].state == "retry"
    beat = Heartbeat(unit=item.unit, recording=0, recordings=1, since=0.0, time=time.time() - 500, host="other", pid=1)
    heartbeat_path(bucket, item.unit).write_text(beat.model_dump_json(), encoding="utf-8")
    (stalled,) = (row for row in status(bucket).units if row.state == "stalled")
    assert "silent" in stalled.reason
    digest = load_snapshot(bucket).digest
    convert_all(config)
    assert load_snapshot(bucket).digest == digest
    assert status(bucket).is_final


def test_a_recording_that_is_a_folder_is_found_on_a_store_and_copied_whole(
    shared_data: Path, bucket: Path, tmp_path: Path
) -> None:
    source = shared_data / "eeglab/testmff.mff"
    root = bucket.parent / "raw"
    for path in source.rglob("*"):
        if path.is_file():
            upload(path, root.joinpath("sub", source.name, *path.relative_to(source).parts))
    corpus = load_corpus("synthetic_psg").model_copy(update={"files": ("**/*.mff",), "reader": "egi"})
    (path,) = corpus_files(corpus, root)
    assert path.relative_to(root).as_posix() == "sub/testmff.mff"
    assert identity_of(path, "egi") == identity_of(source, "egi")
    with local_copy(path, root, corpus, work=tmp_path / "work") as (copy, _):
        found, expected = read_header(copy, "egi"), read_header(source, "egi")
        assert (found.channels, found.annotations) == (expected.channels, expected.annotations)
    assert corpus_files(corpus.model_copy(update={"exclude": ("sub/*.mff",)}), root) == []
    UPath(root / "sub/testmff.mff/info.xml").unlink()
    assert corpus_files(corpus, root) == []
