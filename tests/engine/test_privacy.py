"""Who a person is stays in the recordings: no name in any output, and a secret that makes hashes unguessable."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all, prepare
from engine.plan import read_plan
from engine.scan import scan
from manifests.corpora import load_corpus, subject_hash
from manifests.errors import ConfigError
from manifests.shards import SAMPLES_FILE, load_snapshot

NAME, DOCTOR, HOSPITAL, BORN, STREET = "Mustermann", "Quacksalber", "MCH-0234567", "02-MAY-1951", "Nadelgasse"
PLANTED = (NAME, DOCTOR, HOSPITAL, BORN, STREET, "1951", "Erika")
FILE_NAME = "sub-Hagedorn"


def planted_edf(original: bytes) -> bytearray:
    """EDF+ whose identifying fields and one annotation tell who was recorded."""
    data = bytearray(original)
    data[8:88] = f"{HOSPITAL} F {BORN} Erika_{NAME}".encode().ljust(80)
    data[88:168] = f"Startdate 02-MAR-2002 {HOSPITAL} {DOCTOR} Sony_of_Dr_{DOCTOR}".encode().ljust(80)
    count = int(data[252:256])
    data[256 + 16 * count : 256 + 96 * count] = f"AgAgCl of Erika_{NAME}".encode().ljust(80) * count
    data[256 + 136 * count : 256 + 216 * count] = f"HP:0.1Hz by {DOCTOR}".encode().ljust(80) * count
    data[256 + 224 * count : 256 + 256 * count] = f"for {NAME}".encode().ljust(32) * count
    place = data.index(b"Sleep stage W")
    data[place : place + 13] = b"E. Mustermann"
    return data


def private_root(tiny_root: Path, root: Path) -> Path:
    """Nights and records of one named person: sound ones, and some that end in quarantine."""
    night = planted_edf((tiny_root / "psg/sub-001/sub-001_psg.edf").read_bytes())
    cut, odd, wild = night[: 256 + 100], bytearray(night), bytearray(night)
    odd[236:244] = b"Erika M."  # number of records, which is repaired
    count = int(night[252:256])
    wild[256 + 216 * count : 256 + 224 * count] = b"Erika M." * count  # samples of a record
    for number, content in enumerate((night, cut, odd, wild)):
        path = root / f"psg/{FILE_NAME}{number}/{FILE_NAME}{number}_psg.edf"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    (root / "ecg").mkdir()
    header = (tiny_root / "ecg/E00001.hea").read_text()
    comments = f"# <name>: Erika {NAME}\n# born {BORN}, {STREET} 7\n#Dx: {NAME}\n# Hx: {HOSPITAL} by {DOCTOR}\n"
    for name, text in (("E00001", header + comments), ("E00002", comments + f"E00002 {NAME} {DOCTOR}\n" + comments)):
        (root / f"ecg/{name}.hea").write_text(text.replace("E00001", name))
        (root / f"ecg/{name}.dat").write_bytes((tiny_root / "ecg/E00001.dat").read_bytes())
    return root


def texts(output: Path) -> dict[str, bytes]:
    """Every file of an output by its path; parquet files, which are compressed, as text of their rows."""
    found: dict[str, bytes] = {}
    for path in sorted(output.rglob("*")):
        if path.is_file():
            rows = json.dumps(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else b""
            found[path.relative_to(output).as_posix()] = path.read_bytes() + rows
    return found


def planted_config(kind: str, tiny_root: Path, tmp_path: Path) -> ConvertConfig:
    """Conversion of the named person's nights or heart records with a corpus that fits them."""
    root = private_root(tiny_root, tmp_path / "private")
    pattern = {"pattern": r"(?P<subject>sub-\w+?)_psg"}
    psg = load_corpus("synthetic_psg").model_dump(mode="json") | {"id": "psg", "subject": pattern}
    (tmp_path / "psg.yaml").write_text(json.dumps(psg))
    return ConvertConfig(
        output=tmp_path / "out",
        recipe={"psg": "sleep128", "ecg": "ecg500"}[kind],
        sources=[Source(corpus={"psg": str(tmp_path / "psg.yaml"), "ecg": "synthetic_ecg"}[kind], root=root)],
        quarantine_budget=1.0,
    )


@pytest.mark.parametrize(("kind", "num_bad"), [("psg", 2), ("ecg", 1)])
def test_no_header_text_in_any_output_and_file_names_in_the_ledger_only(
    tiny_root: Path, tmp_path: Path, kind: str, num_bad: int
) -> None:
    config = planted_config(kind, tiny_root, tmp_path)
    result = convert_all(config)
    assert result.counts["windows"] > 0
    assert result.counts["quarantined"] == num_bad
    found = texts(config.output)
    assert any(name.endswith(".tar") for name in found)
    name_of_file = {"psg": FILE_NAME, "ecg": "E00001"}[kind].encode()
    for name, content in found.items():
        for word in PLANTED:
            place = content.find(word.encode())
            assert place < 0, (name, content[max(0, place - 200) : place + 200])
        assert name_of_file not in content or name == "plan.jsonl" or name.startswith("commits/commit-"), name
    assert name_of_file in found["plan.jsonl"]


def test_a_secret_changes_every_hash_and_stands_nowhere(converted: ConvertConfig, tmp_path: Path) -> None:
    secret = hashlib.sha256(b"lab").hexdigest()
    path = tmp_path / "lab.salt"
    path.write_text(secret + "\n")
    config = converted.model_copy(update={"salt_file": path, "replace": True})
    public, plan = load_snapshot(converted.output), read_plan(converted.output)
    public_recordings = set(pq.read_table(converted.output / SAMPLES_FILE).column("recording").to_pylist())
    assert convert_all(config).counts["windows"] == 60
    private, private_plan = load_snapshot(config.output), read_plan(config.output)
    assert not {unit.id for unit in plan} & {unit.id for unit in private_plan}
    assert public.provenance["salt"] == "public"
    assert private.provenance["salt"] == config.salt_fingerprint() != ""
    rows = pq.read_table(config.output / SAMPLES_FILE).to_pylist()
    corpus = load_corpus("synthetic_psg")
    numbers = [f"{number:03d}" for number in range(10)]
    subjects = {row["subject"] for row in rows}
    assert not subjects & {subject_hash(corpus, number) for number in numbers}
    known = {subject_hash(corpus.model_copy(update={"salt": secret.encode()}), number) for number in numbers}
    assert subjects <= known
    assert {row.subject for row in scan(config.sources, salt=config.salt()).rows} <= known
    assert not {row["recording"] for row in rows} & public_recordings
    assert not any(secret[:20].encode() in content for content in texts(config.output).values())
    prepare(config)
    assert read_plan(config.output) == private_plan
    path.write_text(hashlib.sha256(b"other").hexdigest())
    _, units = prepare(config)
    assert not {unit.id for unit in units} & {unit.id for unit in private_plan}


def test_a_missing_or_short_secret_is_refused(tiny_config: ConvertConfig, tmp_path: Path) -> None:
    for content in (None, "short"):
        path = tmp_path / "lab.salt"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match="openssl rand -hex 32"):
            convert_all(tiny_config.model_copy(update={"salt_file": path}))
    corpus = load_corpus("synthetic_psg").model_dump(mode="json") | {"salt": "0123456789abcdef"}
    (tmp_path / "synthetic_psg.yaml").write_text(json.dumps(corpus))
    with pytest.raises(ConfigError, match="does not belong into a corpus file"):
        load_corpus(tmp_path / "synthetic_psg.yaml")
