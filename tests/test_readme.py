"""The README's examples are what they say: its YAML validates."""

import re
import textwrap
from pathlib import Path

from engine.config import ConvertConfig
from manifests.config import load_config
from manifests.corpora import load_corpus

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_corpus_and_the_conversion_of_the_readme_are_valid(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert len(blocks) == 2
    for name, block in zip(("my_lab.yaml", "convert.yaml"), blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    corpus = load_corpus(tmp_path / "my_lab.yaml")
    config = load_config(ConvertConfig, tmp_path / "convert.yaml")
    assert [source.corpus for source in config.sources] == [f"{corpus.id}.yaml"]
