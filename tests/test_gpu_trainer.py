"""A trainer's step on a CUDA device: it waits for nothing, and a graph holds it."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from steps import assert_same
from training import LENGTH, VOCAB, bert, trainer_of

from kdfast.trainer import recipes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", ["hinton", "tinybert_general"])
def test_a_training_step_waits_for_nothing_and_fits_into_a_graph(recipe, tmp_path):
    """A batch without padding: transformers itself looks whether a mask hides anything.

    Trainer waits besides, where it looks whether a loss is a number, clips gradients and logs.
    """
    if torch.cuda.device_count() > 1:
        pytest.skip("Trainer copies models where one process has several devices")
    objective = getattr(recipes, recipe)().objective
    student, teacher = bert(16, 2).cuda(), bert(32, 4).cuda().eval()
    trainer = trainer_of(tmp_path, student, teacher, objective, use_cpu=False)
    model = trainer.model.train()
    batch = {"input_ids": torch.randint(VOCAB, (2, LENGTH), device="cuda")}
    if recipe == "hinton":
        batch["labels"] = torch.randint(VOCAB, (2, LENGTH), device="cuda")
    items = torch.tensor(20, device="cuda")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        loss.backward()
        return [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first finds the output heads, for which it looks at logits.
        step()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in batch.values():
        values.copy_(torch.randint(VOCAB, values.shape, device="cuda"))
    graph.replay()
    replayed = [result.clone() for result in captured]
    assert_same(replayed, step())
