"""`kymo scan --corpus` on the command line: what the corpus file lacks stands below the tables."""

from collections.abc import Callable
from pathlib import Path

from manifests.config import dump_yaml

Kymo = Callable[..., tuple[int, str]]
PATTERN = r"^P(?P<subject>\d+)\.edf$"


def corpus_file(folder: Path) -> Path:
    """A laboratory's corpus file with a gap of every sort, in front of the codes of its scorers."""
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "map": {"Wake": "W", "N2": "N2"}}
    plain = {
        "id": "lab",
        "title": "",
        "licence": "",
        "access": "",
        "reader": "edf",
        "files": ["**/*.edf"],
        "subject": {"pattern": PATTERN},
        "channels": {"EEG C3-A2": "eeg:C3-A2", "PG1": "eog:E1-M2"},
        "annotations": rule,
    }
    path = folder / "lab.yaml"
    path.write_text(dump_yaml(plain))
    return path


def test_what_the_corpus_file_lacks_is_told_in_a_few_lines(
    kymo: Kymo, write_eeg: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "nights"
    root.mkdir()
    write_eeg(root / "P1.edf", unit="furlong")
    (root / "P1.txt").write_text("wake\nN2\nwake\n")
    write_eeg(root / "P2.edf")
    (root / "notes.doc").touch()
    lab = corpus_file(tmp_path)
    code, text = kymo("scan", root, "--corpus", lab)
    assert code == 0
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    for line in (
        "annotation texts that the corpus file does not map (1)",
        "wake 2 1 Wake",
        "channels left out until the corpus file declares their units (1)",
        "EEG C3-A2 eeg:C3-A2 furlong 1",
        "recordings that a conversion rejects for their labels (1)",
        "channels that lab.yaml maps and no recording has: 1 of 2 (PG1)",
        "files that lab.yaml does not take: 1 (.doc 1)",
    ):
        assert line in lines, text
    _, text = kymo("scan", root, "--corpus", lab, "--only", "P2.edf")
    assert "no recording has" not in text
    assert "does not take" not in text
    _, text = kymo("scan", root)
    assert "files that no reader knows: 2 (" in text
    assert "corpus file" not in text


def test_a_path_of_nobody_stops_no_scan_and_the_pattern_is_shown_as_written(
    kymo: Kymo, write_eeg: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "nights"
    root.mkdir()
    for name in ("P1", "N2", "N3"):
        write_eeg(root / f"{name}.edf")
    lab = corpus_file(tmp_path)
    code, text = kymo("scan", root, "--corpus", lab, "--limit", "1")
    assert code == 2
    assert "eeg:C3-A2" in text
    assert "recordings of nobody (2)" in text
    assert "N2.edf" in text
    assert "1 more rows of recordings of nobody" in text
    assert f"lab.yaml: subject.pattern '{PATTERN}' does not match 2 of 3 recordings" in text
    (root / "P1.edf").unlink()
    code, text = kymo("scan", root, "--corpus", lab)
    assert (code, "does not match 2 of 2" in text) == (2, True)
