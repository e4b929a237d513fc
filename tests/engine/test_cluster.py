"""The same snapshot from one, two and four CPUs and from a Ray cluster of three nodes on this machine."""

import pytest
from ray.cluster_utils import Cluster

from engine import pipeline
from engine.config import ConvertConfig
from manifests.shards import SAMPLES_FILE, load_snapshot


def _assert_same(config: ConvertConfig, reference: ConvertConfig) -> None:
    expected, found = load_snapshot(reference.output), load_snapshot(config.output)
    assert found.digest == expected.digest
    for name in (SAMPLES_FILE, *(shard.path for shard in found.shards)):
        assert (config.output / name).read_bytes() == (reference.output / name).read_bytes()


@pytest.mark.parametrize("num_cpus", [1, 2, 4])
def test_any_number_of_cpus(num_cpus: int, converted: ConvertConfig, tmp_path) -> None:
    config = converted.model_copy(update={"output": tmp_path / "shards", "num_cpus": num_cpus, "unit_bytes": 2_500_000})
    assert int(pipeline.run(config).exit_code) == 3
    _assert_same(config, converted)


def test_a_cluster_of_three_nodes(converted: ConvertConfig, tmp_path) -> None:
    import ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 3
        config = converted.model_copy(update={"output": tmp_path / "shards", "num_cpus": 3})
        assert int(pipeline.run(config).exit_code) == 3
        _assert_same(config, converted)
    finally:
        ray.shutdown()
        cluster.shutdown()
