"""What an operator does with a conversion whose output lies on an object store, against moto's S3 on loopback."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from upath import UPath

from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.difference import difference
from engine.heartbeat import Heartbeat, heartbeat_path
from engine.quarantine import evidence, rejected, retry, waive
from engine.repack import repack
from engine.status import status
from engine.storage import location
from engine.verify import verify
from manifests.errors import ConfigError
from manifests.shards import load_snapshot

BUCKET = "ops"


@pytest.fixture
def bucket() -> Iterator[Path]:
    """An empty folder on an S3 server of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        UPath(f"s3://{BUCKET}").fs.mkdir(BUCKET)
        yield location(f"s3://{BUCKET}/out")
        moto.stop()
        UPath(f"s3://{BUCKET}").fs.clear_instance_cache()


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
