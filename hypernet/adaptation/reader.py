"""A hypernetwork that `imprint train` made, as the generator uses it."""

from __future__ import annotations

from pathlib import Path

from hypernet.adaptation.checkpoint import load_checkpoint
from hypernet.reader import CheckpointMismatch, PerceiverReader

FRAME_SPARE = 4
"""Where frame and text meet, tokens may come out otherwise than alone."""


class TemplateReader(PerceiverReader):
    """A chunk is read in a user's turn of the base's chat template, as the checkpoint's configuration says."""

    def __init__(self, checkpoint: Path, base: Path, base_fingerprint: str) -> None:
        """Load both. Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError."""
        network, self.config = load_checkpoint(checkpoint)
        trained_for = network.config.base_fingerprint
        if trained_for != base_fingerprint:
            raise CheckpointMismatch(
                f"the hypernetwork in {checkpoint} was trained for {self.config.base_model} with fingerprint "
                f"{trained_for[:12]}, the base in {base} is {base_fingerprint[:12]}")
        super().__init__(network, base, self.config.base_model)
        self.max_tokens -= len(self.frame("")) + FRAME_SPARE
        self.chunk_tokens = min(self.chunk_tokens, self.max_tokens)

    def frame(self, text: str) -> list[int]:
        """See DocumentReader."""
        whole = self.config.frame.before + text.strip() + self.config.frame.after
        return list(self.tokenizer.encode(whole, add_special_tokens=False))
