import hashlib
import tarfile
from pathlib import Path

import numpy as np

from engine.shardwriter import Spooled, permuted, write_shards
from manifests.shards import parse_sample, tar_sample

UNIT = "00112233445566aa"


def spooled(folder: Path, count: int = 40) -> list[Spooled]:
    samples = []
    for number in range(2):
        spool = folder / f"{number}.bin"
        offset = 0
        with spool.open("wb") as file:
            for i in range(count // 2):
                key = f"corpus-{number}-{i:03d}"
                block = tar_sample(key, {"json": f'{{"i": {i}}}'.encode(), "eeg.npy": bytes(1000)})
                file.write(block)
                samples.append(Spooled(key=key, spool=spool, offset=offset, num_bytes=len(block)))
                offset += len(block)
    return samples


def test_shards_are_cut_by_size_and_indexed(tmp_path: Path) -> None:
    samples = spooled(tmp_path)
    shards, placed = write_shards(samples, output=tmp_path, unit=UNIT, shard_bytes=20_000)
    assert len(shards) > 3
    assert all(20_000 <= shard.num_bytes < 25_000 for shard in shards[:-1])
    assert sorted(place.key for place in placed) == sorted(sample.key for sample in samples)
    for shard in shards:
        path = tmp_path / shard.path
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
        offsets = np.fromfile(path.with_suffix(".idx"), dtype="<u8")
        assert len(offsets) == shard.num_samples + 1
        for place in (place for place in placed if place.shard == shard.path):
            assert place.offset == offsets[place.ordinal]
            assert parse_sample(content[place.offset :][: place.num_bytes])[0] == place.key
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 2 * shard.num_samples


def test_the_same_unit_gives_the_same_bytes_and_another_unit_another_order(tmp_path: Path) -> None:
    samples = spooled(tmp_path)
    first, _ = write_shards(samples, output=tmp_path / "a", unit=UNIT, shard_bytes=20_000)
    again, _ = write_shards(samples, output=tmp_path / "b", unit=UNIT, shard_bytes=20_000)
    assert first == again
    assert permuted(samples, UNIT) != permuted(samples, "0" * 16)


def test_a_shard_mixes_recordings(tmp_path: Path) -> None:
    _, placed = write_shards(spooled(tmp_path), output=tmp_path, unit=UNIT, shard_bytes=20_000)
    in_first = {place.key.split("-")[1] for place in placed if place.shard.endswith("00000.tar")}
    assert in_first == {"0", "1"}


def test_nothing_to_write_gives_no_shard_and_no_temporary_file_stays(tmp_path: Path) -> None:
    assert write_shards([], output=tmp_path, unit=UNIT, shard_bytes=1) == ([], [])
    write_shards(spooled(tmp_path), output=tmp_path, unit=UNIT, shard_bytes=20_000)
    assert not list((tmp_path / "shards").glob(".*"))
