import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.quarantine import rejected, waive
from engine.repack import repack
from engine.report import UNMAPPED_NOTE, html_table, write_report
from engine.report_data import (
    Losses,
    UnitReport,
    channels_by_recording,
    example_keys,
    hours_by_kind,
    label_counts,
    losses,
    metrics_rows,
    num_windows,
    read_report_data,
    suspect_units,
    symbol_order,
    unmapped_annotations,
    unresolved_labels,
)
from engine.report_figures import draw_coverage, draw_labels, draw_losses, draw_training, most_frequent
from engine.synthetic import synthesise
from engine.verify import verify
from manifests.errors import ConfigError


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Three nights of 10 minutes, the first with odd montages, and a broken file."""
    root = tmp_path_factory.mktemp("report")
    synthesise(root / "recordings", num_subjects=3, num_ecg=1, night_minutes=10, seed=1)
    config = ConvertConfig(
        output=root / "shards",
        recipe="sleep128",
        sources=[Source(corpus="synthetic_psg", root=root / "recordings")],
        quarantine_budget=0.5,
    )
    assert convert_all(config).exit_code == 3
    return root / "shards"


@pytest.fixture(scope="module")
def data(snapshot):
    return read_report_data(snapshot)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "sleep_run"
    folder.mkdir()
    rows = [{"step": 10 * i, "loss": 4.0 - i, "windows_per_s": 321.0} for i in range(1, 4)]
    rows[-1] |= {"eval_top1": 0.25, "eval_chance": 0.0156}
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text("encoder: {kind: sleep}  # <b>\n")
    return folder


def test_hours_by_kind_count_windows(data):
    kinds, hours = hours_by_kind(data)
    assert kinds == ["eeg", "eog", "emg", "ecg", "resp"]
    # 3 subjects x 20 windows of 30 s = 0.5 h.
    np.testing.assert_allclose(hours, [[0.5] * 5])


def test_channels_of_each_recording(data):
    channels = channels_by_recording(data)
    assert len(channels) == 3
    assert sum("eeg:O2-A1" in symbols for symbols in channels.values()) == 1
    assert all("resp:thorax" in symbols for symbols in channels.values())


def test_losses_add_up(data):
    found = losses(data)
    assert (found.found, found.committed, found.kept, found.cut) == (4, 3, 60, 60 + sum(found.dropped.values()))
    assert found.found == found.committed + sum(found.quarantined.values())
    assert len(found.quarantined) == 1


def test_the_unknown_label_is_listed(data):
    rows = unresolved_labels(data)
    assert [(row["label"], row["recordings"]) for row in rows] == [("X7", 1)]


def test_annotations_that_no_map_lists_are_counted_and_a_note_says_where_their_texts_are(data, snapshot, tmp_path):
    assert unmapped_annotations(data) == []
    commits = [UnitReport(unmapped={"b": 2}), UnitReport(unmapped={"a": 1200, "b": 3})]
    rows = unmapped_annotations(replace(data, commits=tuple(commits)))
    assert rows == [{"corpus": "a", "annotations": 1200}, {"corpus": "b", "annotations": 5}]

    folder = tmp_path / "odd"
    shutil.copytree(snapshot, folder)
    path = next((folder / "commits").glob("commit-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unmapped": {"synthetic_psg": 7}}))
    text = unescape(write_report(folder, tmp_path / "some.html").read_text(encoding="utf-8"))
    assert "Annotations without a label (7)" in text
    assert UNMAPPED_NOTE in text


def test_stages_by_split_count_every_window(data):
    counts = label_counts(data, "stage")
    assert {split: counter.total() for split, counter in counts.items()} == {"train": 20, "val": 20, "test": 20}
    assert label_counts(data, "classes") == {}


def test_examples_show_each_stage_once(data):
    keys = example_keys(data, 8)
    stages = dict(zip(data.samples["key"].to_pylist(), data.samples["stage"].to_pylist(), strict=True))
    assert sorted(stages[key] for key in keys) == ["N1", "N2", "N3", "R", "W"]
    assert len(example_keys(data, 2)) == 2


def test_metrics_leave_out_a_half_written_row(run):
    assert [row["step"] for row in metrics_rows(run)] == [10, 20, 30]
    assert metrics_rows(run.parent) == []


def test_the_page_is_one_file_with_every_section(snapshot, run, tmp_path):
    path = write_report(snapshot, tmp_path / "new" / "report.html", runs=[run])
    page = path.read_text(encoding="utf-8")
    text = unescape(page)
    for heading in (
        "Hours by corpus and kind",
        "Channel coverage",
        "From files to windows",
        "Quarantine (1)",
        "Channels left out (1 labels)",
        "Stages by split",
        "Examples",
        "sleep_run: loss",
        "sub-004_psg.edf",
        "X7",
        "encoder: {kind: sleep}",
    ):
        assert heading in text, heading
    assert UNMAPPED_NOTE not in text
    # Nothing is loaded from elsewhere; links that a reader may click are allowed.
    loaded = re.findall(
        r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)\s*=\s*[\"']?(?!data:|#)([^\"'\s>]+)", page
    )
    assert loaded == []
    assert not re.search(r"url\(\s*[\"']?https?:", page)
    assert page.count("data:image/png;base64") >= 10
    assert "# &lt;b&gt;" in page


def test_a_run_without_metrics_says_so(snapshot, tmp_path):
    folder = tmp_path / "empty_run"
    folder.mkdir()
    page = write_report(snapshot, tmp_path / "report.html", runs=[folder]).read_text(encoding="utf-8")
    assert "no row with step and loss" in page
    assert "config.yaml is missing" in page


def test_a_folder_without_a_snapshot_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no snapshot"):
        write_report(tmp_path, tmp_path / "report.html")


def test_commits_of_other_versions_are_read(snapshot, tmp_path):
    for name in ("snapshot.json", "samples.parquet"):
        (tmp_path / name).write_bytes((snapshot / name).read_bytes())
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "commit-a.json").write_text('{"counts": {"recordings": 2, "windows": 7}, "novelty": 1}')
    assert losses(read_report_data(tmp_path)).kept == 7
    (tmp_path / "commits" / "commit-b.json").write_text("{")
    with pytest.raises(ConfigError, match=r"commit-b\.json: not a commit"):
        read_report_data(tmp_path)


def test_tables_escape_what_files_say():
    table = html_table([{"label": "<script>", "count": 1234}], code=("label",))
    assert "<code>&lt;script&gt;</code>" in table
    assert '<td class="number">1,234</td>' in table
    assert "3 more rows" in html_table([{"a": 1}] * 503)


def test_the_waterfall_tells_counts_and_reasons():
    counts = Losses(found=10, quarantined={"TRUNCATED": 2}, committed=8, cut=100, dropped={"quality": 25}, kept=75)
    axes = draw_losses(counts).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["10", "−2  20.0%", "8  80.0%", "100", "−25  25.0%", "75  75.0%"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["recordings found", "TRUNCATED", "converted", "windows cut", "quality", "windows kept"]
    lost = axes.patches[1]
    assert (lost.get_x(), lost.get_width()) == (pytest.approx(0.8), pytest.approx(0.2))


def test_coverage_keeps_the_most_frequent_channels():
    channels = {("a", str(i)): frozenset({"eeg:C3", *(["ecg:II"] if i else [])}) for i in range(4)}
    figure, hidden = draw_coverage(channels, max_symbols=1)
    assert hidden == 1
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["eeg:C3"]
    figure, hidden = draw_coverage(channels)
    assert hidden == 0
    assert {"100%", "75%", "a (4)"} <= {text.get_text() for text in figure.axes[0].texts}


def test_a_rare_kind_is_drawn_before_the_ninth_channel_of_another():
    counts = Counter({f"eeg:F{i}": 100 for i in range(1, 10)}) + Counter({"emg:chin": 1})
    assert most_frequent(counts, 9) == [f"eeg:F{i}" for i in (9, 7, 5, 3, 1, 2, 4, 6)] + ["emg:chin"]


def test_symbols_stand_in_the_order_of_the_channel_table():
    symbols = ["resp:flow", "ecg:aVR", "ecg:V1", "ecg:I", "eeg:O1", "eeg:Fp1-M2", "odd:x"]
    expected = ["eeg:Fp1-M2", "eeg:O1", "ecg:I", "ecg:aVR", "ecg:V1", "resp:flow", "odd:x"]
    assert sorted(symbols, key=symbol_order) == expected


def test_label_shares_are_within_a_split(data):
    counts = label_counts(data, "stage")
    figure = draw_labels(counts, ["W", "N1", "N2", "N3", "R"], noun="windows")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(1)


def test_training_curves_end_with_their_values(run):
    figure = draw_training(metrics_rows(run))
    loss, top1 = figure.axes
    assert [text.get_text() for text in loss.texts] == [" 1"]
    assert [text.get_text() for text in top1.texts] == [" 0.25", " chance 0.0156"]
    assert len(draw_training(metrics_rows(run)[:1]).axes) == 1


def test_a_run_of_several_tasks_has_a_curve_for_each() -> None:
    rows = [{"step": step, "split": "train", "loss": {"a": 1.0, "b": 2.0}} for step in (1, 2)]
    figure = draw_training([*rows, {"step": 2, "split": "val", "metrics": {}}])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["training loss, a", "training loss, b"]


def test_no_unit_of_the_synthetic_recordings_is_in_doubt(data):
    assert data.snapshot.counts["unit_suspect"] == 0
    assert all(entry["unit_suspect"] == {} for entry in data.snapshot.corpora.values())
    assert {entry["mains_hz"] for entry in data.snapshot.corpora.values()} == {50}
    assert suspect_units(data) == []


def test_units_in_doubt_are_listed_with_what_would_be_plausible(data):
    commits = (UnitReport(unit_suspect={"a": {"ecg": 2, "eeg": 5}}), UnitReport(unit_suspect={"a": {"ecg": 1}}))
    rows = suspect_units(replace(data, commits=commits))
    assert [(row["kind"], row["unit"], row["channels"]) for row in rows] == [("eeg", "uV", 5), ("ecg", "mV", 3)]
    assert rows[0]["plausible"] == "robust amplitude 0.5 to 500"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=1, num_ecg=1, night_minutes=10)
    config = ConvertConfig(
        output=tmp_path_factory.mktemp("native") / "shards",
        recipe="native",
        sources=[Source(corpus="synthetic_psg", root=root)],
        quarantine_budget=0.5,
    )
    return convert_all(config), config.output


def test_recorded_rates_pass_the_whole_engine(native, tmp_path):
    result, folder = native
    assert result.snapshot is not None
    assert not verify(folder, deep=True).problems
    data = read_report_data(folder)
    rates = set(zip(*(data.samples.column(name).to_pylist() for name in ("rate_num", "rate_den")), strict=True))
    assert len(rates) > 1
    assert num_windows(data.samples) == 60
    assert len(data.samples) == 60 * len(rates)
    kinds, hours = hours_by_kind(data)
    assert "eeg" in kinds
    assert hours.max() == pytest.approx(60 * 10 / 3600)
    (symbols,) = channels_by_recording(data).values()
    assert len(symbols) == sum(len(row) for row in data.samples.slice(0).column("symbols").to_pylist()) / 60
    assert "Units in doubt" in write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_repacked_snapshot_tells_where_its_losses_stand_and_not_that_there_were_none(snapshot, tmp_path):
    repack(snapshot, tmp_path / "new")
    text = unescape(write_report(tmp_path / "new", tmp_path / "page.html").read_text())
    digest = read_report_data(snapshot).snapshot.digest
    assert f"what was lost stands in the report of snapshot {digest}" in text
    for word in ("No recording was quarantined", "Every channel label was resolved", "amplitude is plausible"):
        assert word not in text
    assert "Hours by corpus and kind" in text
    assert "1 of them quarantined" in text


def test_a_waiver_stands_beside_its_recording_as_text(snapshot, tmp_path):
    folder = tmp_path / "waived"
    shutil.copytree(snapshot, folder)
    (item,) = rejected(folder)
    assert "waived" not in quarantine_columns(write_report(folder, tmp_path / "before.html"))
    waive(folder, [item.path], note="amplifier <b>off</b>")
    page = write_report(folder, tmp_path / "after.html")
    assert "waived" in quarantine_columns(page)
    text = page.read_text()
    assert "amplifier &lt;b&gt;off&lt;/b&gt; (20" in text
    assert "<b>off</b>" not in text


def quarantine_columns(page):
    """Header cells of the table of quarantined recordings."""
    tables = re.findall(r"<table.*?</table>", page.read_text(), flags=re.DOTALL)
    (found,) = [table for table in tables if "<th>message</th>" in table]
    return re.findall(r"<th>(.*?)</th>", found)
