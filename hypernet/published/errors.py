"""What can be wrong with a published checkpoint."""

from __future__ import annotations


class CheckpointInvalid(ValueError):
    """The checkpoint cannot be used; the message names the file or tensor, what is wrong and what is allowed."""
