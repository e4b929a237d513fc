import shutil
from fractions import Fraction
from pathlib import Path

import pytest

import engine.scan
from engine.config import ConvertConfig, Source
from engine.recording import Channel, Recording, Segment
from engine.scan import load_sources, resolve_channels, scan, scan_folder, subject_of
from manifests.corpora import Corpus, load_corpus
from manifests.errors import ConfigError


def corpus_with(**changes: object) -> Corpus:
    return Corpus.model_validate(load_corpus("synthetic_psg").model_dump() | changes)


def test_scan_tells_hours_channels_and_the_broken_file(tiny_config: ConvertConfig) -> None:
    result = scan(tiny_config.sources)
    (row,) = result.corpus_rows()
    assert (row["corpus"], row["recordings"], row["subjects"], row["unreadable"]) == ("synthetic_psg", 3, 3, 1)
    assert row["hours"] == pytest.approx(0.5)
    symbols = {item["symbol"]: item for item in result.channel_rows()}
    assert symbols["resp:thorax"]["recordings"] == 3
    assert symbols["resp:thorax"]["share"] == 1.0
    assert [item["label"] for item in result.unresolved_rows()] == ["X7"]
    (bad,) = result.unreadable_rows()
    assert bad["reason"] in {"TRUNCATED", "HEADER_INVALID"}
    assert all(item["rate_hz"] > 0 for item in result.rate_rows())


def test_expected_totals_are_compared(tiny_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = corpus_with(id="mine", expected={"subjects": 3, "recordings": 5, "hours": 0.5}).model_dump_json()
    path.write_text(text, encoding="utf-8")
    (row,) = scan([Source(corpus=str(path), root=tiny_root)]).corpus_rows()
    assert row["differs"] == ["recordings"]


def test_scan_folder_needs_no_corpus(tiny_root: Path) -> None:
    result = scan_folder(tiny_root)
    assert {Path(row.path).suffix for row in result.readable} == {".edf", ".hea"}
    assert len(result.readable) == 6
    assert not any(row.subject for row in result.rows)
    assert scan_folder(tiny_root / result.readable[-1].path).rows[0].identity == result.readable[-1].identity


def test_no_raw_subject_in_a_row(tiny_config: ConvertConfig) -> None:
    for row in scan(tiny_config.sources).rows:
        assert len(row.subject) == 12
        assert "sub-" not in row.subject


def test_a_path_that_belongs_to_nobody_is_refused(tiny_root: Path) -> None:
    corpus = corpus_with(subject={"pattern": "^other/(?P<subject>x)"})
    with pytest.raises(ConfigError, match=r"synthetic_psg.yaml: subject.pattern .* does not match 'psg/"):
        subject_of(corpus, "psg/sub-001/sub-001_psg.edf")


def test_files_of_nobody_are_listed_in_a_survey_and_refused_all_at_once_else(tiny_root: Path, tmp_path: Path) -> None:
    pattern = r"^psg/sub-(?P<subject>001)/sub-\d+_psg\.edf$"
    path = tmp_path / "mine.yaml"
    path.write_text(corpus_with(id="mine", subject={"pattern": pattern}).model_dump_json(), encoding="utf-8")
    sources = [Source(corpus=str(path), root=tiny_root)]
    others = [f"psg/sub-00{number}/sub-00{number}_psg.edf" for number in (2, 3, 4)]
    found = scan(sources, survey=True)
    assert [row.path for row in found.rows] == ["psg/sub-001/sub-001_psg.edf"]
    assert found.nobodys == {"mine": others}
    alone = scan(sources, survey=True, only=others[0])
    assert (alone.rows, alone.nobodys) == ((), {"mine": others[:1]})
    with pytest.raises(ConfigError) as refused:
        scan(sources)
    assert str(refused.value) == (
        f"mine.yaml: subject.pattern '{pattern}' does not match 3 of 4 files ({', '.join(others)}); "
        "widen the pattern or exclude the files"
    )


def test_files_that_nobody_takes_are_counted_by_suffix(tiny_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    path = tmp_path / "mine.yaml"
    folder = root / "psg/sub-001"
    for name in ("sub-001_psg.txt", "sub-001_psg.TXT~", "notes.PDF", "README", "sub-001_psg-other.xml"):
        (folder / name).write_text("W\n")
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "required": False}
    corpus = corpus_with(id="mine", annotations=rule, exclude=["**/*.xml"])
    path.write_text(corpus.model_dump_json(), encoding="utf-8")
    ecg = {".hea": 3, ".dat": 3}
    assert scan([Source(corpus=str(path), root=root)], survey=True).skipped == {
        ".pdf": 1,
        ".txt~": 1,
        "no suffix": 1,
        **ecg,
    }
    assert scan_folder(root).skipped == {".pdf": 1, ".txt~": 1, ".txt": 1, ".xml": 1, "no suffix": 1}
    assert not scan_folder(folder / "sub-001_psg.edf").skipped


def _named(*labels: str) -> Recording:
    channels = [
        Channel(index=n, label=label, rate=Fraction(256), unit="uV", prefilter="", num_samples=256)
        for n, label in enumerate(labels)
    ]
    whole = Segment(start=Fraction(0), duration=Fraction(1))
    return Recording(path=Path("x.bdf"), channels=tuple(channels), segments=(whole,))


def test_numbered_amplifier_inputs_are_not_taken_for_ears_eyes_or_scalp_sites() -> None:
    biosemi = _named("A1", "A2", "A3", "A4", "B1", "B2", "C3", "Fz")
    found, missed = resolve_channels(biosemi, None)
    assert [tag.symbol for _, tag in found] == ["eeg:Fz"]
    assert {item.label for item in missed} == {"A1", "A2", "A3", "A4", "B1", "B2", "C3"}

    found, _ = resolve_channels(_named("E1", "E2", "C3", "C4", "A1", "A2"), None)
    assert [tag.symbol for _, tag in found] == ["eog:E1", "eog:E2", "eeg:C3", "eeg:C4"]


def test_numbered_inputs_that_a_corpus_names_are_kept() -> None:
    corpus = load_corpus("synthetic_psg").model_copy(update={"channels": {"A1": "eeg:Fp1"}})
    found, _ = resolve_channels(_named("A1", "A3", "A4", "B1"), corpus)
    assert [tag.symbol for _, tag in found] == ["eeg:Fp1"]


def test_segments_of_a_record_are_not_listed_beside_it(shared_data: Path) -> None:
    rows = scan_folder(shared_data / "wfdb_variants/multi-segment").rows
    names = [Path(row.path).name for row in rows]
    assert names == ["041s.hea", "s25047-2704-05-04-10-44.hea", "s25047-2704-05-04-10-44n.hea"]
    assert rows[0].num_bytes == 64 + 441 + 443 + 2 * 24000


def test_a_source_may_ask_for_the_published_split(tmp_path: Path) -> None:
    for record in ("102", "201", "202"):
        (tmp_path / f"{record}.hea").touch()

    def splits(**choice: str) -> list[str]:
        return [row.split for row in scan([Source(corpus="mitdb", root=tmp_path, **choice)]).rows]

    assert splits() == ["train", "train", "train"]
    assert splits(split="published") == splits(split="dechazal") == ["unused", "train", "test"]
    with pytest.raises(ConfigError, match="known: strict, dechazal"):
        splits(split="mine")


def test_corpora_whose_shared_persons_cannot_be_joined_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [Source(corpus=name, root=tmp_path) for name in ("ptbxl", "challenge2021")]
    with pytest.raises(ConfigError, match=r"ptbxl and challenge2021 hold recordings of the same persons"):
        load_sources(sources)
    assert len(load_sources([Source(corpus=name, root=tmp_path) for name in ("tueg", "tuab")])) == 2
    assert caplog.messages == ["tuab is part of tueg: its recordings come twice"]


def test_a_published_split_beside_a_strict_one_is_refused_where_persons_are_shared(tmp_path: Path) -> None:
    published = Source(corpus="tuab", root=tmp_path, split="published")
    with pytest.raises(ConfigError, match=r"tuab has the split published and shares persons with tueg"):
        load_sources([Source(corpus="tueg", root=tmp_path), published])
    runs = [Source(corpus=name, root=tmp_path, split="cbramod") for name in ("eegmmidb", "eegmmidb_feet")]
    assert len(load_sources(runs)) == 2


def test_a_decoder_that_fails_in_a_new_way_costs_one_recording(tiny_config: ConvertConfig, monkeypatch) -> None:
    def read_header(path: Path, reader: str, layout: object = None) -> Recording:
        if path.name == min(names):
            raise RecursionError("Planted^Name")
        return original(path, reader, layout)

    original = engine.scan.read_header
    names = {Path(row.path).name for row in scan(tiny_config.sources).readable}
    monkeypatch.setattr(engine.scan, "read_header", read_header)
    crashed = [row for row in scan(tiny_config.sources).rows if row.reason == "CRASHED"]
    assert len(crashed) == 1
    assert "Planted" not in crashed[0].message
