"""Fine-tuning on digits, beside coremltools: the same network, epochs and seeds.

``python -m benchmarks.fine_tuning --seeds 5 --epochs 10``
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits import accuracy, data, train, trained

import milpress as cto


def pruner(home: Any, model: nn.Module, epochs: int) -> Any:
    updates = f"range(0, {epochs * 18 * 6 // 10}, 18)"
    settings = {"target_sparsity": 0.75, "scheduler": {"update_steps": updates}}
    config = home.pruning.MagnitudePrunerConfig.from_dict({"global_config": settings})
    return home.pruning.MagnitudePruner(model, config)


def palettizer(home: Any, model: nn.Module, _epochs: int) -> Any:
    settings = {"n_bits": 2, "weight_threshold": 0, "palett_tau": 1e-3}
    config = home.palettization.DKMPalettizerConfig.from_dict({"global_config": settings})
    return home.palettization.DKMPalettizer(model, config)


def quantizer(dtype: str) -> Callable[[Any, nn.Module, int], Any]:
    def make(home: Any, model: nn.Module, _epochs: int) -> Any:
        observers = dict.fromkeys(("weight_observer", "activation_observer"), "ema_min_max")
        settings = {"weight_dtype": dtype, **observers}
        config = home.quantization.LinearQuantizerConfig.from_dict({"global_config": settings})
        return home.quantization.LinearQuantizer(model, config)

    return make


WAYS = {
    "75 % zeros": pruner,
    "2-bit palettes": palettizer,
    "W8A8": quantizer("qint8"),
    "W4A8": quantizer("qint4"),
}


def fine_tuned(home: Any, way: Any, model: nn.Module, epochs: int, seed: int) -> nn.Module:
    optimizer = way(home, model, epochs)
    images, *_ = data()
    is_quantizer = hasattr(optimizer, "enable_observer_sync")
    prepared = optimizer.prepare((images[:1],)) if is_quantizer else optimizer.prepare()
    train(prepared, epochs, 1e-3, [optimizer], seed)
    return optimizer.finalize().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from coremltools.optimize import torch as reference

    homes = {"milpress": cto.torch, "coremltools": reference}
    models = [trained(seed) for seed in range(arguments.seeds)]
    floats = [accuracy(model) for model in models]
    print(f"{'float':16}{'':14}mean {statistics.mean(floats):.1%}")
    for name, way in WAYS.items():
        for home_name, home in homes.items():
            started = time.process_time()
            found = [
                accuracy(fine_tuned(home, way, model, arguments.epochs, seed))
                for seed, model in enumerate(models)
            ]
            seconds = (time.process_time() - started) / len(found)
            each = " ".join(f"{value:.1%}" for value in found)
            mean = statistics.mean(found)
            print(
                f"{name:16}{home_name:14}mean {mean:.2%}  {each}  {seconds:.1f} CPU-s", flush=True
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
