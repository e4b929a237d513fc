"""A corpus of damaged, lying and hostile files, each converted as a conversion would: in the sandbox's child.

Every case (`damage*.py`) states how it must end: converted, or refused with exactly one reason. No case may crash the
child, hang, or take memory that its bytes do not justify.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.read import sniff
from engine.sandbox import Job, Sandbox
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.recipes import Recipe
from tests.engine.damage import CONVERTED, Case, edf_data_cases, edf_file_cases, edf_header_cases
from tests.engine.damage_arrays import array_cases
from tests.engine.damage_wfdb import wfdb_cases

TIME_LIMIT_S = 10.0
MEMORY_LIMIT_GB = 1.0
PEAK_BYTES = 400 << 20  # of the child over all cases, 200 MB of it imports

# The child notes its peak memory after every recording.
CHILD = """
    from pathlib import Path
    from engine.sandbox import convert_recording, serve

    def convert(job):
        try:
            return convert_recording(job)
        finally:
            status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage would tell the parent's peak too
            job.spool.with_suffix(".peak").write_text(status.partition("VmHWM:")[2].split()[0], encoding="ascii")

    serve(convert)
"""

RECIPE = Recipe.model_validate(
    {"id": "small", "title": "", "window_s": 4, "hop_s": 4, "kinds": {"eeg": {"rate_hz": 64, "low_hz": 0.5}}}
)


def corpus_of(reader: str, layout: dict | None = None) -> Corpus:
    return Corpus.model_validate(
        {
            "id": "damaged",
            "title": "",
            "licence": "",
            "access": "",
            "reader": reader,
            "files": ["*"],
            "subject": {"pattern": r"(?s)^(?P<subject>.+)"},
            "layout": layout or {},
        }
    )


CASES = [*edf_header_cases(), *edf_data_cases(), *edf_file_cases(), *wfdb_cases(), *array_cases()]

# Every recording among the malformed files at hand; what no reader recognises is no recording to a scan.
MALFORMED = {
    "bdf_test.bdf": "CHANNEL_UNRESOLVED",  # sound; its labels are those of a test
    "bdf_test.edf": "CHANNEL_UNRESOLVED",
    "crlf_mangled_S001R04.edf": "HEADER_INVALID",
    "duplicate_channel_labels.edf": CONVERTED,
    "edfAnnonC.edf": "TOO_SHORT",
    "edfPlusD.edf": "NO_CHANNELS",
    "eeglab_test_nrec_minus1.bdf": "CHANNEL_UNRESOLVED",  # numbered inputs of an amplifier
    "empty_streams.xdf": "CHANNEL_UNRESOLVED",
    "gitlfs_pointer_short_psg.edf": "NOT_A_RECORDING",
    "minimal.xdf": "TOO_SHORT",
    "pyedflib_test_generator.bdf": "CHANNEL_UNRESOLVED",
    "sub-xp101_task-motorloc_eeg.vhdr": "TOO_SHORT",  # 0.05 s are left of it
    "test_reduced_11rates.edf": CONVERTED,
    "test_uneven_samp.edf": "CHANNEL_UNRESOLVED",
    "truncated_ds001787_sub-001_eeg.bdf": "TRUNCATED",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("child")
    (folder / "noting_child.py").write_text(textwrap.dedent(CHILD), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with Sandbox(time_limit_s=TIME_LIMIT_S, memory_limit_gb=MEMORY_LIMIT_GB, module="noting_child") as child:
            yield child


def outcome(sandbox: Sandbox, case: Case, folder: Path, root: Path | None = None) -> tuple[str, str]:
    """How a case ends, and with what words; its memory is checked on the way."""
    if root is None:
        root = folder / "root"
        root.mkdir()
    path = case.path(root)
    spool = folder / "spool.bin"
    job = Job(path=path, root=root, corpus=corpus_of(case.reader, case.layout), recipe=RECIPE, spool=spool)
    try:
        answer = sandbox.convert(job)
    except RecordingError as error:
        return error.reason, str(error)
    finally:
        assert int(spool.with_suffix(".peak").read_text(encoding="ascii")) * 1024 < PEAK_BYTES
    assert answer["rows"]
    return CONVERTED, ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_ends_as_stated(sandbox: Sandbox, tmp_path: Path, case: Case) -> None:
    reason, message = outcome(sandbox, case, tmp_path)
    assert (reason, message if case.word in message else "") == (case.reason, message), message


def test_every_malformed_file_at_hand_ends_as_stated(sandbox: Sandbox, tmp_path: Path, shared_data: Path) -> None:
    found: dict[str, str] = {}
    root = shared_data / "malformed_edge_cases"
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        reader = sniff(path)
        if reader is None:
            continue
        (tmp_path / str(number)).mkdir()
        case = Case(path.name, lambda _, path=path: path, "", reader=reader)
        found[path.name], _ = outcome(sandbox, case, tmp_path / str(number), root)
    assert found == MALFORMED
