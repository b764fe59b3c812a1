"""Task descriptions to adapters with a converted Text-to-LoRA network (arXiv 2506.06105).

The description is embedded by the text encoder that the network was trained with: its first token's last hidden state,
scaled to a fixed length. The base itself is never run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from hypernet.documents import DocumentError
from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import layers_path
from hypernet.lora import LoraAdapter
from hypernet.published.bases import check_base, hub_name
from hypernet.published.folder import load_text_to_lora
from hypernet.published.frames import short_name
from hypernet.published.text_to_lora import scale_embedding
from hypernet.reader import CheckpointMismatch

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192
"""The longest description that the published networks' encoder reads."""


class DescriptionEncoder:
    """A bidirectional text encoder, on the CPU in float32. Not thread-safe."""

    def __init__(self, encoder: str, trust_remote_code: bool = False) -> None:
        """`encoder` is a folder in the format of transformers or sentence-transformers, or a Hugging Face name.

        Raises CheckpointMismatch where it is no encoder that can be used, FileNotFoundError or OSError.
        """
        self.folder = _folder(encoder)
        config = _encoder_config(self.folder, encoder, trust_remote_code)
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        self._model: Any = AutoModel.from_pretrained(
            self.folder, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
        self._model.requires_grad_(False)
        self.width = int(config.hidden_size)
        positions = int(getattr(config, "max_position_embeddings", MAX_TOKENS))
        # A tokenizer without a limit names an astronomic one.
        self.max_tokens = min(positions, int(self._tokenizer.model_max_length), MAX_TOKENS)

    def tokens(self, description: str) -> list[int]:
        """The tokens that the encoder reads. Raises DocumentError where there are none, or too many."""
        text = description.strip()
        if not text:
            raise DocumentError("text: is empty; a task description needs at least one character other than white "
                                "space")
        # As in training, where every description ended like a sentence.
        tokens = list(self._tokenizer.encode(text + "." if text[-1].isalpha() else text, verbose=False))
        if len(tokens) > self.max_tokens:
            raise DocumentError(f"text: is too long: the task description has {len(tokens)} tokens; at most "
                                f"{self.max_tokens} are allowed")
        return tokens

    @torch.no_grad()
    def embed(self, description: str) -> Tensor:
        """The vector `[width]` of length sqrt(width) that the network reads. Raises DocumentError as `tokens`."""
        # Alone, not in a batch: a description's adapter must not depend on what else was asked for.
        ids = torch.tensor([self.tokens(description)])
        state: Tensor = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return scale_embedding(state[0, 0].float())


class TaskGenerator:
    """A Text-to-LoRA network with its encoder, for one base. `generate` is not thread-safe."""

    def __init__(self, checkpoint: Path, base: Path, encoder: str, *, max_rank: int | None = None,
                 base_fingerprint: str = "", trust_remote_code: bool = False) -> None:
        """Load the network and its encoder; of `base`, a folder, only sizes and fingerprint are taken.

        `max_rank` is the engine's cap; `base_fingerprint` saves hashing the base again where it is known;
        `trust_remote_code` lets an encoder run the Python code in its folder, which `encoder`'s owner wrote.
        Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError.
        """
        self._network, self.config = load_text_to_lora(checkpoint)
        rank = self.config.sizes.rank
        if max_rank is not None and rank > max_rank:
            raise CheckpointMismatch(f"max_lora_rank {max_rank} is below {rank}, the rank of the adapters that the "
                                     f"Text-to-LoRA network in {checkpoint} makes")
        self.base_fingerprint = base_fingerprint or fingerprint_folder(base)
        check_base(self.config, base, self.base_fingerprint)
        with torch.device("meta"):
            self._layers = layers_path(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))
        self.encoder = DescriptionEncoder(encoder, trust_remote_code)
        self._check_encoder(encoder)
        # The same description gives another adapter with another encoder.
        both = f"{fingerprint_folder(checkpoint)}\0{fingerprint_folder(self.encoder.folder)}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    @property
    def max_tokens(self) -> int:
        """The longest description, in tokens of the encoder."""
        return self.encoder.max_tokens

    def check(self, description: str) -> None:
        """Raise DocumentError where a description is empty or too long."""
        self.encoder.tokens(description)

    def generate(self, descriptions: Sequence[str]) -> list[LoraAdapter]:
        """The adapter of each task. Raises DocumentError where a description is empty or too long."""
        for description in descriptions:
            self.check(description)
        return [self._network.adapter(self.encoder.embed(description), self.config.scaling,
                                      self.config.base_model).placed(self._layers) for description in descriptions]

    def _check_encoder(self, encoder: str) -> None:
        wanted, trained_with = self.config.sizes.embedding, self.config.embedding_model
        if self.encoder.width != wanted:
            raise CheckpointMismatch(f"the Text-to-LoRA network reads embeddings of width {wanted} by "
                                     f"{trained_with or 'an encoder that is not named'}; the encoder {encoder} gives "
                                     f"width {self.encoder.width}")
        name = hub_name(self.encoder.folder) or encoder
        if short_name(name) != short_name(trained_with):
            logger.warning("the Text-to-LoRA network was trained with the encoder %s; whether %s is that encoder can "
                           "be told by its width only", trained_with or "(not named)", encoder)


def _folder(encoder: str) -> Path:
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(encoder))
    except (HFValidationError, HfHubHTTPError, FileNotFoundError) as error:
        raise FileNotFoundError(f"encoder '{encoder}': there is no such folder, and no model of that name could be "
                                f"fetched: {error}") from error


def _encoder_config(folder: Path, encoder: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise CheckpointMismatch(f"encoder {encoder}: transformers has no model of its kind; where the folder brings "
                                 f"Python code for it, that runs only with trust_remote_code: {error}") from error
    if getattr(config, "is_encoder_decoder", False) or any(
            name.endswith("ForCausalLM") for name in config.architectures or ()):
        raise CheckpointMismatch(f"encoder {encoder}: is a {config.model_type} model, which writes text; an encoder "
                                 "whose first token stands for the whole text is needed")
    return config
