"""torch.compile of an encoder's parts: the same numbers and names, at any batch size."""

from collections.abc import Callable

import pytest
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.config import PretrainConfig
from trainer.export import load_encoder
from trainer.loop import pretrain
from trainer.metrics import read_metrics

MakeConfig = Callable[..., PretrainConfig]


@pytest.mark.usefixtures("zero_alone")
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_a_compiled_run_has_the_losses_and_names_of_an_eager_one(
    stage: int, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = CompileCounterWithBackend("aot_eager")  # inductor takes minutes on a CPU
    compile_part = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part, **options: compile_part(part, backend=counted, **options))
    encoder = {"kind": "sleep", "width": 8, "depth": 2, "num_heads": 1, "conv_channels": [4, 4]}
    # 9 windows in 2 micro-batches with channels dropped at random: every batch has another shape.
    settings = {"encoder": encoder, "steps": 4, "zero_stage": stage, "gradient_accumulation": 2, "evaluation": None}
    eager, compiled = tiny_config("eager", **settings), tiny_config("compiled", **settings, compile=True)
    pretrain(eager)
    assert counted.frame_count == 0
    pretrain(compiled.model_copy(update={"stop_at": 2}))
    result = pretrain(compiled.model_copy(update={"compile": False}))  # its checkpoint serves an eager run
    assert 0 < counted.frame_count < 40
    rows = {name: [row["loss"] for row in read_metrics(c.run_dir)] for name, c in (("e", eager), ("c", compiled))}
    assert rows["c"] == pytest.approx(rows["e"], rel=1e-5)
    assert not [name for name in load_encoder(result.encoder).state_dict() if "_orig_mod" in name]
