import os
from collections.abc import Callable

import pytest
import torch
from torch import distributed

from manifests.errors import ConfigError, ContractError
from trainer.collectives import rank, world_size
from trainer.process_group import is_launched, join_group, run_on_rank_zero, torchrun_words


def answers_of_rank_0(number: int, port: int, group: dict[str, str]) -> None:
    """What rank 0 returns or raises is what both ranks get."""
    os.environ.update({**group, "MASTER_PORT": str(port), "RANK": str(number), "LOCAL_RANK": str(number)})
    assert is_launched()
    assert join_group("gloo", timeout_s=60) == "gloo"
    assert (rank(), world_size()) == (number, 2)
    tensor = run_on_rank_zero(lambda: {"x": torch.full((2,), float(rank()) + 7)})["x"]
    assert tensor.tolist() == [7.0, 7.0]
    calls = []

    def refuse(kind: type[Exception]) -> None:
        calls.append(kind)
        raise kind("where: value, rule, remedy")

    for kind, seen in ((ConfigError, ConfigError), (ContractError, ContractError)):
        with pytest.raises(seen, match=r"^where: value, rule, remedy$"):
            run_on_rank_zero(lambda kind=kind: refuse(kind))
    with pytest.raises(OSError if number == 0 else RuntimeError, match="remedy"):
        run_on_rank_zero(lambda: refuse(OSError))
    assert len(calls) == (3 if number == 0 else 0)
    distributed.barrier()


def test_what_rank_0_finds_is_what_all_ranks_get(run_ranks: Callable[..., None]) -> None:
    run_ranks(answers_of_rank_0, {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"})


def test_the_words_that_start_the_ranks_of_torchrun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in (("LOCAL_WORLD_SIZE", "4"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "gpu01")):
        monkeypatch.setenv(name, value)
    assert torchrun_words() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun_words() == "torchrun --nproc-per-node 4"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert torchrun_words() == ("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint gpu01 --nproc-per-node 4")


def test_one_process_asks_itself() -> None:
    assert run_on_rank_zero(lambda: 3) == 3
    with pytest.raises(ConfigError, match="no"):
        run_on_rank_zero(lambda: (_ for _ in ()).throw(ConfigError("no")))
