"""One conversion at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.lock import locked
from manifests.errors import ConfigError


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from engine.lock import locked\nwith locked(Path(sys.argv[1])): pass"
    )
    with locked(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert "another kymo convert is writing here" in other.stderr
        with pytest.raises(ConfigError, match="another kymo convert"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
