"""What a scan remembers of recordings on a store."""

from pathlib import Path

import pytest

from engine import scan_cache
from engine.scan_cache import CACHE_FILE, ScanCache
from manifests.corpora import load_corpus


def test_what_a_scan_used_is_remembered_and_the_rest_forgotten(tmp_path: Path) -> None:
    cache = ScanCache(tmp_path)
    cache.save()
    assert not (tmp_path / CACHE_FILE).exists()
    cache.put("a", {"duration": "1"})
    cache.put("b", {"duration": "2"})
    cache.save()
    mark = (tmp_path / CACHE_FILE).stat().st_mtime_ns
    same = ScanCache(tmp_path)
    assert [same.get(key) for key in "abc"] == [{"duration": "1"}, {"duration": "2"}, None]
    same.save()
    assert (tmp_path / CACHE_FILE).stat().st_mtime_ns == mark
    less = ScanCache(tmp_path)
    less.get("b")
    less.save()
    assert ScanCache(tmp_path).get("a") is None
    assert ScanCache(tmp_path).get("b") == {"duration": "2"}


def test_another_file_corpus_or_code_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = load_corpus("synthetic_psg"), load_corpus("synthetic_ecg")
    keys = [
        ScanCache(tmp_path).key(one, "1"),
        ScanCache(tmp_path).key(one, "2"),
        ScanCache(tmp_path).key(other, "1"),
        ScanCache(tmp_path).key(one.model_copy(update={"layout": {"a": 1}}), "1"),
    ]
    monkeypatch.setattr(scan_cache, "code_digest", lambda: "other code")
    keys.append(ScanCache(tmp_path).key(one, "1"))
    assert len(set(keys)) == len(keys)
    assert ScanCache(tmp_path).key(one, "1") == keys[-1]
