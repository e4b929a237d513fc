"""Contents that look like a format and are none."""

import subprocess
import sys

import pytest

from engine.read import READERS, sniff
from engine.readers.magic import SIGNATURES


def test_every_signature_names_a_reader():
    assert {name for name, _ in SIGNATURES} <= set(READERS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.vhdr", b"Brain Vision notes, no header file"),
        ("a.vmrk", b"Brain Vision Data Exchange Marker File, Version 1.0\n"),
        ("a.wav", b"RIFF\0\0\0\0WAVEfmt "),
        ("a.mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64"),
        ("a.gdf", b"GDF notes"),
        ("a.ini", b"[Other]\n[FileInfo]\n"),
        ("a.raw", bytes(40)),
        ("a.bin", b"\0\0\0\2" + b"\0" * 60),
        ("a.cnt", b"Version 2.9"),
        ("a.eeg", b"EEG-1100C V01.00" + bytes(300)),
        ("a.pnt", b"EEG-1100C V01.00" + bytes(20)),
        ("empty.fif", b""),
    ],
)
def test_what_only_resembles_a_format_is_passed_over(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert sniff(tmp_path / name) is None


def test_a_folder_is_none_unless_it_is_a_recording(tmp_path):
    assert sniff(tmp_path) is None
    folder = tmp_path / "a.mff"
    folder.mkdir()
    (folder / "info.xml").write_text("<fileInfo/>")
    assert sniff(folder) is None


def test_telling_formats_apart_loads_no_decoder():
    code = "import sys, engine.read; print([m for m in ('mne', 'scipy', 'h5py', 'antio', 'wfdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
