import hashlib
import json

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.commit import sample_schema
from engine.preview import KIND_COLOURS, draw_sample, draw_window, first_key, label_text, read_window
from manifests.channels import KINDS
from manifests.errors import ConfigError, ContractError
from manifests.shards import TAR_END, ShardEntry, Snapshot, npy_bytes, tar_sample

RATE = 128


def tag(symbol, unit, scale):
    return {"symbol": symbol, "kind": symbol.partition(":")[0], "unit": unit, "scale": scale, "rate": [RATE, 1]}


def sample(number):
    """Key, arrays (int16) and JSON of a 10-s window whose every value tells the sample's number."""
    key = f"tiny-{number:04d}"
    wave = np.round(1100 * np.sin(np.arange(10 * RATE) / 9)).astype(np.int16)
    arrays = {"eeg": np.stack([wave + number, 2 * wave]), "ecg": (wave // 2)[None]}
    meta = {
        "key": key,
        "corpus": "tiny",
        "subject": "0123456789ab",
        "split": "val",
        "start": 30 * RATE * number,
        "length": 10 * RATE,
        "rate": [RATE, 1],
        "quality": 0.97,
        "ucs": {
            "eeg": [tag("eeg:C3-M2", "uV", 0.05), tag("eeg:O2-M1", "uV", 0.1)],
            "ecg": [tag("ecg:II", "mV", 0.001)],
        },
        "labels": {"stage": ["N2"], "events": [[2 * RATE, 3 * RATE, "apnoea"]]},
    }
    return key, arrays, meta


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    (folder / "shards").mkdir()
    content, rows = b"", []
    for number in range(3):
        key, arrays, meta = sample(number)
        members = {f"{kind}.npy": npy_bytes(array) for kind, array in arrays.items()}
        block = tar_sample(key, {**members, "json": json.dumps(meta).encode()})
        rows.append({"key": key, "shard": "shards/a.tar", "offset": len(content), "num_bytes": len(block)})
        content += block
    (folder / "shards" / "a.tar").write_bytes(content + TAR_END)
    table = pa.Table.from_pylist(rows, schema=sample_schema())
    pq.write_table(table, folder / "samples.parquet")
    manifest = Snapshot(
        format_version=1,
        shards=[ShardEntry(path="shards/a.tar", num_bytes=len(content), sha256="", num_samples=3, unit="a")],
        corpora={"tiny": {}},
        recipe={"id": "tiny"},
        recipe_digest="",
        ucs_version=1,
        ucs_digest="",
        samples_sha256=hashlib.sha256((folder / "samples.parquet").read_bytes()).hexdigest(),
        counts={},
    )
    manifest = manifest.model_copy(update={"digest": manifest.content_digest()})
    (folder / "snapshot.json").write_text(manifest.model_dump_json())
    return folder


def test_a_window_is_read_at_its_offset_in_physical_units(snapshot):
    assert first_key(snapshot) == "tiny-0000"
    for number in (0, 2):
        key, stored, meta = sample(number)
        arrays, found = read_window(snapshot, key)
        assert found == meta
        np.testing.assert_allclose(arrays["eeg"], stored["eeg"] * np.array([[0.05], [0.1]]), rtol=1e-6)
        np.testing.assert_allclose(arrays["ecg"], stored["ecg"] * 0.001, rtol=1e-6)


def test_an_unknown_key_names_the_nearest(snapshot, tmp_path):
    with pytest.raises(ConfigError, match="no sample 'tiny-0009'; nearest: tiny-000"):
        draw_sample(snapshot, "tiny-0009", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_shifted_shard_is_a_broken_contract(snapshot, tmp_path):
    for name in ("snapshot.json", "samples.parquet"):
        (tmp_path / name).write_bytes((snapshot / name).read_bytes())
    content = (snapshot / "shards" / "a.tar").read_bytes()
    num_bytes = (len(content) - len(TAR_END)) // 3
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(content[num_bytes:])
    with pytest.raises(ContractError, match="'tiny-0001' instead of 'tiny-0000'"):
        draw_sample(tmp_path, "tiny-0000", tmp_path / "x.png")


def test_the_figure_names_channels_units_time_and_labels(snapshot):
    arrays, meta = read_window(snapshot, "tiny-0001")
    figure = draw_window(arrays, meta)
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text in {"C3-M2", "O2-M1", "II"}] == ["C3-M2", "O2-M1", "II"]
    # The strongest EEG channel swings by 220 µV, the ECG by 0.55 mV; scale bars are round.
    assert {"200 µV", "0.5 mV", " apnoea"} <= set(texts)
    assert axes.get_xlim() == (0, 10)
    assert "tiny: stage N2" in [text.get_text() for text in figure.texts]
    traces = [line for line in axes.lines if len(line.get_xdata()) == 10 * RATE]
    assert [line.get_color() for line in traces] == [KIND_COLOURS["eeg"]] * 2 + [KIND_COLOURS["ecg"]]
    # One scale per kind: the second EEG channel is drawn four times as high as the first.
    first, second = (np.ptp(np.asarray(line.get_ydata())) for line in traces[:2])
    assert second == pytest.approx(4 * first, rel=0.01)


def test_a_flat_channel_is_drawn(snapshot):
    arrays, meta = read_window(snapshot, "tiny-0000")
    figure = draw_window({**arrays, "ecg": np.zeros((1, 10 * RATE), dtype=np.float32)}, meta)
    traces = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 10 * RATE]
    assert np.ptp(np.asarray(traces[2].get_ydata())) == 0


def test_the_png_is_written_and_not_blank(snapshot, tmp_path):
    path = draw_sample(snapshot, "tiny-0000", tmp_path / "new" / "a.png")
    image = matplotlib.image.imread(path)
    assert image.shape[1] == 12 * 110
    assert 0.02 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5


def test_labels_as_one_line():
    assert label_text({"stage": ["N2", "N2"], "classes": ["a", "b"]}) == "stage N2 · class a, b"
    assert label_text({"stage": ["N2", "N3"]}) == "stage N2 N3"
    assert label_text({}) == "no label"


def test_every_kind_has_its_own_colour():
    assert list(KIND_COLOURS) == list(KINDS)
    assert len(set(KIND_COLOURS.values())) == len(KINDS)
