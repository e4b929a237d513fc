"""Every real file that a reader recognises, through one conversion: committed, or quarantined for the reason told."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.read import sniff
from engine.verify import verify

# Why a file is no sample; those that are shorter than one 10-s window of recipe native are counted below.
REASONS = {
    "CHANNEL_UNRESOLVED": {  # numbered inputs, test signals, tables in EDF: a corpus file must say what they are
        "eegutils/Newtest17-256.bdf",
        "malformed_edge_cases/bdf_test.bdf",
        "malformed_edge_cases/bdf_test.edf",
        "malformed_edge_cases/eeglab_test_nrec_minus1.bdf",
        "malformed_edge_cases/empty_streams.xdf",
        "malformed_edge_cases/pyedflib_test_generator.bdf",
        "malformed_edge_cases/test_uneven_samp.edf",
        "resmed_cpap/STR.edf",
        "wfdb_variants/flac_3_constant.hea",
    },
    "HEADER_INVALID": {
        "eeglab/test.xdf",  # 998.4 Hz where the stream declares 1000
        "malformed_edge_cases/crlf_mangled_S001R04.edf",
        "xdf_examples/clock_resets.xdf",  # 92.9 Hz where the stream declares 100
    },
    "NOT_A_RECORDING": {"malformed_edge_cases/gitlfs_pointer_short_psg.edf"},
    "NO_CHANNELS": {"wfdb_variants/multi-segment/s25047/s25047-2704-05-04-10-44n.hea"},  # a sample a minute
    "TRUNCATED": {
        "malformed_edge_cases/truncated_ds001787_sub-001_eeg.bdf",
        "resmed_cpap/DATALOG/20230822/20230822_224924_BRP.edf",
        "resmed_cpap/DATALOG/20230822/20230822_224924_PLD.edf",
        "resmed_cpap/DATALOG/20230822/20230822_224924_SAD.edf",
        "sleep_edf/SC4001E0_PSG.hea",
        "wfdb_variants/1003.hea",
        "wfdb_variants/multi-segment/s25047/3234460_layout.hea",
    },
    "UNIT_UNKNOWN": {"ucddb_epochs/ucd018_C3A2_reassembled.edf"},
}
NUM_TOO_SHORT = 40
CONVERTED = {"edf": 40, "wfdb": 162, "brainvision": 1, "cnt": 1, "dicom": 1, "eeglab": 1, "fif": 1}


def _sources(root: Path, folder: Path) -> list[Source]:
    """One corpus for each reader, without a label of its own: the generic parser must do."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        reader = sniff(path) if path.is_file() or path.suffix == ".mff" else None
        if reader is not None:
            files[reader].append(path.relative_to(root).as_posix())
    sources = []
    for reader, names in files.items():
        corpus = {"id": f"all_{reader}", "title": reader, "licence": "see the folder", "access": "shared"}
        corpus |= {"reader": reader, "files": names, "subject": {"pattern": "(?P<subject>.+)"}, "mains_hz": 50}
        (folder / f"all_{reader}.yaml").write_text(json.dumps(corpus), encoding="utf-8")
        sources.append(Source(corpus=str(folder / f"all_{reader}.yaml"), root=root))
    return sources


def test_every_real_file_ends_as_told(shared_data: Path, tmp_path: Path) -> None:
    config = ConvertConfig(
        output=tmp_path / "shards", recipe="native", sources=_sources(shared_data, tmp_path), quarantine_budget=1.0
    )
    result = convert_all(config)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for item in result.quarantine:
        found[item.reason].add(item.path)
    assert len(found.pop("TOO_SHORT")) == NUM_TOO_SHORT
    assert found == REASONS
    assert result.snapshot is not None
    entries = result.snapshot.corpora
    converted = Counter({name.removeprefix("all_"): e["recordings"] - e["quarantined"] for name, e in entries.items()})
    assert +converted == CONVERTED
    assert verify(config.output, deep=True).is_sound
