"""A base of which every rank keeps a share: what stands in memory, by bytes."""

import gc
import json
import multiprocessing
import os

import pytest
import torch

from tests.support.paths import TINY_LLAMA
from tests.support.ranks import free_port

pytestmark = pytest.mark.slow
NUM_RANKS = 3


def measure(rank, port, results):
    """The bytes of the base in this process, whole and as a share, and what a step gives either way."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    import torch.distributed as dist

    from custom_components.datasets.batching import collate
    from custom_components.distributed.ranks import Ranks
    from custom_components.distributed.sharding import LayerShards
    from custom_components.models.builders import lora_llama_from_config
    from custom_components.runtime.launched import place_of_process
    from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
    from custom_components.training.loss import LinearCrossEntropy
    from custom_components.weights.checkpoint_files import open_checkpoint
    from custom_components.weights.checkpoint_loading import load_base_weights
    from tests.support.models import CPU, with_random_adapters
    from tests.support.rows import random_rows

    store, _, _ = next(iter(dist.rendezvous("env://")))
    ranks = Ranks(place_of_process(), store)
    ranks.begin(60, "cpu")

    def figures_of(kind):
        with torch.device("meta"):
            checkpoint = TINY_LLAMA / "checkpoint"
            model = lora_llama_from_config(
                checkpoint, ["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, quantize_base=True
            )
        torch.manual_seed(0)
        shards = LayerShards(ranks, CPU) if kind == "sharded" else None
        load_base_weights(model, open_checkpoint(checkpoint), torch.float32, CPU, shards=shards)
        with_random_adapters(model).train()
        figures = [layer_bytes()]
        loss_of = supervised_loss(model, LinearCrossEntropy(), ForwardOptions(num_recomputed_layers=2))
        batch = collate(random_rows(2))
        with torch.no_grad():
            loss_of(batch)
        figures.append(layer_bytes())
        loss = accumulate_gradients([batch], loss_of, torch.amp.GradScaler("cpu", enabled=False), CPU)
        figures.append(layer_bytes())
        gradients = [parameter.grad.norm().item() for parameter in model.parameters() if parameter.requires_grad]
        return {"bytes": figures, "loss": loss.item(), "gradients": gradients}

    results.put((rank, json.dumps({kind: figures_of(kind) for kind in ("whole", "sharded")})))
    dist.destroy_process_group()


def layer_bytes():
    """The bytes of all NF4 codes that have memory in this process, gathered ones included."""
    from custom_components.models import nf4

    frozen = {}
    gc.collect()
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and not value.is_meta:
            for tensor in nf4.stored_tensors(value.detach() if nf4.is_quantized(value) else value):
                tensor = getattr(tensor, "_local_tensor", tensor)
                if tensor.dtype is torch.uint8 and tensor.untyped_storage().nbytes() > 1000:
                    frozen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(frozen.values())


def test_a_rank_holds_its_share_after_loading_after_a_forward_and_after_a_step():
    """Without a root FSDP2 keeps all layers after the forward, and the losses are right all the same."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=measure, args=(rank, port, results)) for rank in range(NUM_RANKS)]
    for process in processes:
        process.start()
    measured = dict(results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join()
    for text in measured.values():
        whole, sharded = (json.loads(text)[kind] for kind in ("whole", "sharded"))
        assert len(set(whole["bytes"])) == 1 and whole["bytes"][0] > 1_000_000
        for num_bytes in sharded["bytes"]:
            assert num_bytes < whole["bytes"][0] / NUM_RANKS * 1.02, (whole["bytes"], sharded["bytes"])
        assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert sharded["gradients"] == pytest.approx(whole["gradients"], rel=1e-5)
