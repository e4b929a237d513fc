"""Ablations: what is planned, what goes on after a kill, what the table and the picture say."""

import csv
import io
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from pydantic import ValidationError

import jobs
from adapters.ablate import AblationConfig, Row, ablate, plan_runs
from adapters.ablate_table import COLUMNS, csv_text, draw_rows, markdown_text, write_table
from adapters.config import AdaptConfig
from adapters.methods import METHODS
from adapters.train import adapt
from manifests.config import dump_yaml, load_config
from manifests.errors import ConfigError

CONFIGS = Path(jobs.__file__).parent / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("ablate_*.yaml"))


@pytest.fixture
def make_ablation(make_config, tmp_path):
    def make(**changes) -> AblationConfig:
        base = make_config(steps=1, eval_every=9, checkpoint_every=9, keep="last", eval_windows=32)
        values = {"run_dir": str(tmp_path / "table"), "base": base.model_dump(mode="json")}
        values["variants"] = [{"name": "rank 4"}]
        return AblationConfig.model_validate({**values, **changes})

    return make


def row(variant: str, task: str = "staging", **changes) -> Row:
    values = {
        "metric": "kappa",
        "value": 0.5,
        "interval": (0.4, 0.6),
        "extremes": (0.45, 0.55),
        "chance": 0.0,
        "seeds": 2,
        "windows": 100,
        "subjects": 10,
        "trainable": 12345,
        "seconds": 12.5,
    }
    return Row(variant=variant, task=task, **{**values, **changes})


def _undefined(variant: str, task: str, **changes) -> Row:
    return row(variant, task, value=None, interval=None, extremes=None, **changes)


def test_every_variant_runs_with_every_seed_a_seed_after_the_other(make_ablation):
    config = make_ablation(
        variants=[{"name": "Rank 4"}, {"name": "attention only", "set": ["lora.targets=attention"]}], seeds=[0, 7]
    )
    planned = plan_runs(config)
    assert [(run.variant, run.seed) for run in planned] == [
        ("Rank 4", 0), ("attention only", 0), ("Rank 4", 7), ("attention only", 7)
    ]  # fmt: skip
    assert [run.config.seed for run in planned] == [0, 0, 7, 7]
    assert [run.config.lora.targets for run in planned] == ["both", "attention"] * 2
    folders = [Path(run.config.run_dir).relative_to(config.run_dir).as_posix() for run in planned]
    assert folders == ["rank-4/seed-0", "attention-only/seed-0", "rank-4/seed-7", "attention-only/seed-7"]
    first = planned[0].config.model_copy(update={"run_dir": planned[1].config.run_dir, "lora": planned[1].config.lora})
    assert first == planned[1].config  # nothing else differs


def test_each_task_alone_is_a_run_per_task(make_ablation):
    config = make_ablation(variants=[{"name": "all", "set": ["method=full"], "each_task": True}])
    planned = plan_runs(config)
    assert [Path(run.config.run_dir).name for run in planned] == ["sleep_staging", "rhythm"]
    assert [len(run.config.tasks) for run in planned] == [1, 1]


def test_a_grid_is_every_combination(make_ablation):
    planned = plan_runs(make_ablation(variants=[], grid={"lora.r": [2, 4], "temporal": ["trainable", "frozen"]}))
    assert [(run.config.lora.r, run.config.temporal) for run in planned] == [
        (2, "trainable"), (2, "frozen"), (4, "trainable"), (4, "frozen")
    ]  # fmt: skip
    assert planned[1].variant == "lora.r 2, temporal frozen"
    assert Path(planned[1].config.run_dir).parent.name == "lora.r-2-temporal-frozen"


def test_what_all_rows_change_comes_before_what_one_changes(make_ablation):
    variants = [{"name": "rank 4"}, {"name": "long", "set": ["steps=50"]}]
    planned = plan_runs(make_ablation(set=["steps=20", "lora.r=2"], variants=variants))
    assert [(run.config.steps, run.config.lora.r) for run in planned] == [(20, 2), (50, 2)]


def test_a_base_may_be_a_file(make_ablation, tmp_path):
    (tmp_path / "base.yaml").write_text(dump_yaml(make_ablation().base))
    assert plan_runs(make_ablation(base=str(tmp_path / "base.yaml"))) == plan_runs(make_ablation())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [{"name": "Rank 4"}, {"name": "rank-4"}]}, "one folder 'rank-4'; give each another name"),
        ({"variants": [{"name": "…"}]}, "one folder ''"),
        ({"variants": []}, "nothing to compare"),
        ({"seeds": [1, 1]}, "it would count double"),
    ],
)
def test_tables_that_cannot_be_told_apart_are_refused(make_ablation, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_ablation(**changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "variant 'wrong': seed=3 is the table's"),
        ("storage=s3://lab/run", r"variant 'wrong': storage: .* would be that of every run"),
        ("lora.rank=3", r"variant 'wrong': lora.rank: no such key; "),
        ("method=full", "variant 'wrong': .*method full trains one task"),
        ("lora.kind=pissa", "variant 'wrong': lora.kind: .*writes its start into the weights of the base"),
    ],
)
def test_a_wrong_variant_is_refused_before_anything_is_trained(make_ablation, override, message):
    config = make_ablation(variants=[{"name": "right"}, {"name": "wrong", "set": [override]}])
    with pytest.raises(ConfigError, match=message):
        ablate(config, learn=lambda _: pytest.fail("trained"))
    assert not Path(config.run_dir).exists()


def test_a_table_goes_on_where_it_was_killed(make_ablation):
    config = make_ablation(
        variants=[
            {"name": "adapters"},
            {"name": "alone", "set": ["method=full"], "each_task": True},
        ],
        seeds=[0, 1],
    )
    learned, tables = [], []

    def dies_at_the_third(run: AdaptConfig):
        if len(learned) == 2:
            raise KeyboardInterrupt
        learned.append(run.run_dir)
        return adapt(run)

    with pytest.raises(KeyboardInterrupt):
        ablate(config, learn=dies_at_the_third, report=tables.append)
    assert [len({row.variant for row in table}) for table in tables] == [1, 2]
    steps: list[str] = []

    def counted(run: AdaptConfig):
        result = adapt(run, report=lambda _: steps.append(run.run_dir))
        trained[run.run_dir] = sum(parameter.numel() for parameter in result.model.trainable().values())
        results[run.run_dir] = result.scores
        return result

    trained: dict[str, int] = {}
    results: dict[str, dict] = {}
    rows = ablate(config, learn=counted)
    assert len(trained) == 2 * 3
    assert set(steps) == set(trained) - set(learned)  # finished runs are read back
    assert [(row.variant, row.task) for row in rows] == [
        (variant, task) for variant in ("adapters", "alone") for task in ("sleep_staging", "rhythm")
    ]
    assert {row.seeds for row in rows} == {2}
    by_name = {(row.variant, row.task): row for row in rows}
    runs = [f"{config.run_dir}/adapters/seed-{seed}" for seed in (0, 1)]
    adapters = by_name["adapters", "rhythm"]
    assert adapters.trainable == trained[runs[0]]
    entries = [results[run]["rhythm"]["test"]["metrics"][adapters.metric] for run in runs]
    assert adapters.value == pytest.approx(sum(entry["value"] for entry in entries) / 2)
    assert adapters.interval == pytest.approx(
        tuple(sum(entry["interval"][end] for entry in entries) / 2 for end in (0, 1))
    )
    assert adapters.extremes == (min(e["value"] for e in entries), max(e["value"] for e in entries))
    alone = [trained[f"{config.run_dir}/alone/seed-0/{task}"] for task in ("sleep_staging", "rhythm")]
    assert by_name["alone", "rhythm"].trainable == sum(alone)


def test_csv_and_markdown_say_the_same(tmp_path):
    rows = [row("rank 8"), _undefined("rank 8", "rhythm", windows=1, subjects=1), row("a|b", value=-0.1)]
    lines = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert tuple(lines[0]) == COLUMNS
    assert [(line["variant"], line["value"], line["low"], line["highest_seed"]) for line in lines] == [
        ("rank 8", "0.5", "0.4", "0.55"), ("rank 8", "", "", ""), ("a|b", "-0.1", "0.4", "0.55")
    ]  # fmt: skip
    assert markdown_text(rows).splitlines() == [
        "| variant | staging: Cohen's kappa | rhythm: Cohen's kappa | trainable | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| rank 8 | 0.500 (0.400–0.600) |  | 12,345 | 12.5 |",
        r"| a\|b | -0.100 (0.400–0.600) |  | 12,345 | 12.5 |",
        "",
        "Mean of 2 seeds; 95 % interval over subjects in brackets. Scored on:",
        "",
        "* staging: 100 windows of 10 subjects",
        "* rhythm: 1 window of 1 subject",
    ]
    paths = write_table(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.csv", "ablation.md", "ablation.png"}
    assert paths["csv"].read_text() == csv_text(rows)


def test_the_picture_grows_with_tasks_and_variants_and_has_equal_bytes():
    rows = [row(f"rank {rank}", task) for rank in (4, 8) for task in ("staging", "rhythm")]
    rows += [_undefined("a probe", "staging")]
    assert draw_rows(rows) == draw_rows(rows)
    assert draw_rows(rows) != draw_rows([row("rank 4", value=0.51), *rows[1:]])
    size, fewer = (imread(io.BytesIO(draw_rows(some)), format="png").shape for some in (rows, rows[:1]))
    assert size[0] > fewer[0]
    assert size[1] > fewer[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_ablations_are_valid_runs(name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent.parent)
    text = (CONFIGS / name).read_text()
    config = load_config(AblationConfig, CONFIGS / name)
    planned = plan_runs(config)
    command = re.search(rf"^# Command: kymo ablate jobs/configs/{name}(.*)$", text, re.MULTILINE)
    assert command is not None
    assert plan_runs(load_config(AblationConfig, CONFIGS / name, command[1].split()))
    assert f"{len(planned)} runs" in text
    assert f"Result: {config.run_dir}/ablation." in text


def test_the_ablations_of_the_paper_are_shipped(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent.parent)
    runs = {name: [run.config for run in plan_runs(load_config(AblationConfig, CONFIGS / name))] for name in SHIPPED}
    adapters = runs["ablate_adapters.yaml"]
    assert {run.lora.targets for run in adapters} == {"attention", "feed_forward", "both"}
    assert {run.lora.r for run in adapters} == {4, 8, 16, 32}
    assert all(run.lora.alpha == 2 * run.lora.r for run in adapters)
    assert {run.temporal for run in adapters} == {"trainable", "frozen"}
    for name in ("ablate_baselines.yaml", "ablate_demo.yaml"):
        assert {run.method for run in runs[name]} == {"lora", "full", "linear_probe", "hps", "mmoe", "cgc"}
    assert [run.lora.kind for run in runs["ablate_methods.yaml"]] == list(METHODS)
