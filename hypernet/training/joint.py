"""Trains the nano base and its hypernetwork together, between the base's own stage and the hypernetwork's.

The base learns to read and, in the same steps, to be changed by the adapters that the hypernetwork emits for it; the
hypernetwork learns from a base that meets it half-way. Whether that beats a hypernetwork on a frozen base at the same
cost has not been measured. After this stage the base is frozen. One step has `BATCHES_A_STEP` micro-batches; a share of
`READING_SHARE` are the base's own (`hypernet.training.base.sample_row`), the rest are those of
`hypernet.training.hypernetwork.Trainer` with the reading rows' answers as one more loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hypernet.encoder import load_base
from hypernet.perceiver import Hypernetwork
from hypernet.training import base as reading
from hypernet.training import loop
from hypernet.training.batches import Encoding
from hypernet.training.hypernetwork import INTERFERENCE_FROM, Trainer, hypernetwork_for, split_parameters
from hypernet.training.relations import RelationClassifier

BATCHES_A_STEP, READING_SHARE = 2, 0.25


def train_joint(base_folder: Path, folder: Path, minutes: float, seed: int = 501,
                start: Path | None = None) -> tuple[PreTrainedModel, Hypernetwork]:
    """Train from the base in `base_folder`, or go on from the checkpoint in `folder`; base and hypernetwork.

    `start`: hypernetwork weights to begin with; the schedule of what is sampled then starts at `INTERFERENCE_FROM`.
    """
    base, tokenizer = load_base(base_folder)
    base.requires_grad_(True)
    torch.manual_seed(0)
    network = hypernetwork_for(base)
    if start is not None:
        network.load_state_dict(load_file(start))
    classifier = RelationClassifier(base.config.hidden_size)
    both = nn.ModuleDict({"base": base, "classifier": classifier, "network": network})
    matrices, others = split_parameters(network)
    optimiser = reading.optimiser_for(base, (matrices, [*others, *classifier.parameters()]), muon_lr=0.004, decay=0.75)
    encoding, rng = Encoding(tokenizer), Random(seed)
    trainer = Trainer(base, encoding, network, rng, joint=True)
    source = reading.ReadingBatches(encoding, rng, len(tokenizer), classifier)
    first = 0.0 if start is None else INTERFERENCE_FROM

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        progress = first + (1 - first) * progress
        for _ in range(BATCHES_A_STEP):
            if rng.random() < READING_SHARE:
                yield source.next_loss(base, max(0.6, progress))
            else:
                yield trainer.micro_batch(progress)

    loop.run(both, optimiser, steps, minutes, folder, "joint")
    return base, network
