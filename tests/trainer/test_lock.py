"""Two runs in one folder: the second is refused while the first lives."""

from pathlib import Path

import pytest

from manifests.errors import ConfigError
from trainer.lock import hold


def test_the_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = hold(tmp_path / "run" / "lock")
    with pytest.raises(ConfigError, match="another run is training here"):
        hold(tmp_path / "run" / "lock")
    first.close()
    hold(tmp_path / "run" / "lock", patience_s=1.0).close()
