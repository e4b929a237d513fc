"""The README's examples are what they say: its YAML validates, and the runs that it names exist."""

import re
import textwrap
from pathlib import Path

from adapters.config import AdaptConfig
from engine.config import ConvertConfig
from manifests.config import load_config
from manifests.corpora import load_corpus
from manifests.tasks import load_task
from trainer.config import PretrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_corpus_the_conversion_and_the_pretraining_of_the_readme_are_valid(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert len(blocks) == 3
    for name, block in zip(("my_lab.yaml", "convert.yaml", "pretrain.yaml"), blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    corpus = load_corpus(tmp_path / "my_lab.yaml")
    config = load_config(ConvertConfig, tmp_path / "convert.yaml")
    assert [source.corpus for source in config.sources] == [f"{corpus.id}.yaml"]
    run = load_config(PretrainConfig, tmp_path / "pretrain.yaml")
    assert run.weights is not None
    assert all(load_corpus(name).id == name for name in run.weights)


def test_every_configuration_that_the_readme_names_is_there() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"jobs/configs/[a-z_/]+\.yaml", readme))
    assert named
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


def test_what_the_commands_of_the_readme_write_lies_in_the_ignored_folder_demo() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^kymo (?:report|preview|predict|export) .*", readme, re.MULTILINE)
    assert len(lines) >= 5
    assert not [line for line in lines if not re.search(r" --out demo/| export \S+ demo/", line)]
    assert "/demo/" in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_example_of_a_task_of_ones_own_is_valid() -> None:
    text = (REPOSITORY / "jobs/configs/add_task.yaml").read_text(encoding="utf-8")
    assert "encoder" not in text.replace("temporal encoder", "")  # kymo bundle add-task takes that of the bundle
    config = load_config(AdaptConfig, REPOSITORY / "jobs/configs/add_task.yaml", ["encoder=of the bundle"])
    task = load_task(REPOSITORY / config.tasks[0].task)
    assert (task.labels, task.is_exclusive) == (["rem"], True)
